#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| node_image_builder::fuzzing::settings(bytes));
