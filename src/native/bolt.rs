//! containerd's databases: reads a bbolt file and writes one of the same contents.
//!
//! A bbolt file depends on more than its contents: freed pages keep what once stood there, and where a page is depends on
//! the transactions before. A file written anew depends on its contents alone, so that the same image has the same bytes.
//! The format is that of `go.etcd.io/bbolt` version 2 (page.go, bucket.go, db.go of v1.3).

use std::collections::BTreeMap;

/// Bytes of a page in files written here, as bbolt has it on amd64.
const PAGE: usize = 4096;
const PAGE_HEADER: usize = 16;
/// Bytes of a page for each of its keys, beside the key.
const ELEMENT: usize = 16;
const BUCKET_HEADER: usize = 16;
const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const META: u16 = 0x04;
const FREELIST: u16 = 0x10;
/// Marks the value of a leaf as a bucket.
const IS_BUCKET: u32 = 0x01;
const MAGIC: u32 = 0xED0C_DAED;
const FORMAT: u32 = 2;
/// Bytes of a meta page's contents that its checksum covers.
const META_BODY: usize = 56;
/// A bucket without buckets stands in its parent's page if it is not larger.
const MAX_INLINE: usize = PAGE / 4;
/// Buckets within buckets; containerd has eight.
const MAX_DEPTH: usize = 32;

/// The file is not what bbolt writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not a bbolt file of version {FORMAT}: {0}")]
pub struct BoltError(&'static str);

/// A value or a bucket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Entry {
    Value(Vec<u8>),
    Bucket(Bucket),
}

/// Keys in the order of their bytes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Bucket {
    /// The number that the next one is counted from.
    pub sequence: u64,
    pub entries: BTreeMap<Vec<u8>, Entry>,
}

/// Reads the newest state in a file.
pub(super) fn read(file: &[u8]) -> Result<Bucket, BoltError> {
    // The page size stands in the meta page, the second of which is one page behind the first.
    let first = meta(file, 0);
    let second = first.map_or(PAGE, |meta| meta.page_size);
    let newest = [first, meta(file, second)].into_iter().flatten().max_by_key(|meta| meta.transaction);
    let newest = newest.ok_or(BoltError("it has no valid meta page"))?;
    // A page, a key and a value are part of one bucket only.
    let pages_left = file.len() / newest.page_size;
    let mut reader = Reader { file, page_size: newest.page_size, pages_left, bytes_left: file.len() };
    reader.bucket(newest.root, newest.sequence, 0)
}

#[derive(Clone, Copy)]
struct Meta {
    page_size: usize,
    root: u64,
    sequence: u64,
    transaction: u64,
}

fn meta(file: &[u8], offset: usize) -> Option<Meta> {
    let body = file.get(offset..)?.get(PAGE_HEADER..)?;
    let page_size = u32_at(body, 8).ok()? as usize;
    let valid = u32_at(body, 0).ok()? == MAGIC
        && u32_at(body, 4).ok()? == FORMAT
        && u64_at(body, META_BODY).ok()? == fnv1a(body.get(..META_BODY)?)
        && page_size.is_power_of_two()
        && page_size >= 512;
    if !valid {
        return None;
    }
    Some(Meta {
        page_size,
        root: u64_at(body, 16).ok()?,
        sequence: u64_at(body, 24).ok()?,
        transaction: u64_at(body, 48).ok()?,
    })
}

struct Reader<'f> {
    file: &'f [u8],
    page_size: usize,
    pages_left: usize,
    bytes_left: usize,
}

impl<'f> Reader<'f> {
    fn bucket(&mut self, root: u64, sequence: u64, depth: usize) -> Result<Bucket, BoltError> {
        let mut bucket = Bucket { sequence, entries: BTreeMap::new() };
        let mut pages = vec![root];
        while let Some(number) = pages.pop() {
            let page = self.page(number)?;
            let count = usize::from(u16_at(page, 10)?);
            match u16_at(page, 8)? {
                BRANCH => {
                    for number in 0..count {
                        pages.push(u64_at(page, PAGE_HEADER + number * 16 + 8)?);
                    }
                }
                LEAF => self.leaf(page, count, &mut bucket, depth)?,
                _ => return Err(BoltError("a page is not what its place asks for")),
            }
        }
        Ok(bucket)
    }

    fn page(&mut self, number: u64) -> Result<&'f [u8], BoltError> {
        self.pages_left = self.pages_left.checked_sub(1).ok_or(BoltError("its pages lead in a circle"))?;
        let start = usize::try_from(number).ok().and_then(|number| number.checked_mul(self.page_size));
        let page = start.and_then(|start| self.file.get(start..)).ok_or(BoltError("a page is behind its end"))?;
        let more = u32_at(page, 12)? as usize;
        let size = more.checked_add(1).and_then(|pages| pages.checked_mul(self.page_size));
        size.and_then(|size| page.get(..size)).ok_or(BoltError("a page is behind its end"))
    }

    fn leaf(&mut self, page: &[u8], count: usize, bucket: &mut Bucket, depth: usize) -> Result<(), BoltError> {
        for number in 0..count {
            let element = PAGE_HEADER + number * ELEMENT;
            let (flags, place) = (u32_at(page, element)?, u32_at(page, element + 4)? as usize);
            let (key_size, value_size) = (u32_at(page, element + 8)? as usize, u32_at(page, element + 12)? as usize);
            let rest = page.get(element + place..).ok_or(BoltError("a key is behind the end of its page"))?;
            let (Some(key), Some(value)) =
                (rest.get(..key_size), rest.get(key_size..).and_then(|r| r.get(..value_size)))
            else {
                return Err(BoltError("a value is behind the end of its page"));
            };
            let is_bucket = flags & IS_BUCKET != 0;
            // What is in a bucket is counted there.
            let own = ELEMENT + key_size + if is_bucket { 0 } else { value_size };
            self.bytes_left = self.bytes_left.checked_sub(own).ok_or(BoltError("its values are in each other"))?;
            let entry =
                if is_bucket { Entry::Bucket(self.nested(value, depth + 1)?) } else { Entry::Value(value.to_vec()) };
            bucket.entries.insert(key.to_vec(), entry);
        }
        Ok(())
    }

    fn nested(&mut self, value: &[u8], depth: usize) -> Result<Bucket, BoltError> {
        if depth > MAX_DEPTH {
            return Err(BoltError("its buckets are too deep"));
        }
        let (root, sequence) = (u64_at(value, 0)?, u64_at(value, 8)?);
        if root != 0 {
            return self.bucket(root, sequence, depth);
        }
        let page = value.get(BUCKET_HEADER..).unwrap_or_default();
        let count = usize::from(u16_at(page, 10)?);
        let mut bucket = Bucket { sequence, entries: BTreeMap::new() };
        self.leaf(page, count, &mut bucket, depth)?;
        Ok(bucket)
    }
}

/// A file with these contents.
pub(super) fn write(root: &Bucket) -> Vec<u8> {
    const FIRST: u64 = 3;
    let mut writer = Writer { pages: vec![], next: FIRST };
    let page = writer.bucket(root);
    let mut file = vec![];
    // bbolt takes the meta page of the later transaction; a new file has two.
    for transaction in [0_u64, 1] {
        let mut body = [MAGIC.to_le_bytes(), FORMAT.to_le_bytes(), le32(PAGE), le32(0)].concat();
        for number in [page, root.sequence, 2, writer.next, transaction] {
            body.extend(number.to_le_bytes());
        }
        let checksum = fnv1a(&body);
        body.extend(checksum.to_le_bytes());
        file.extend(padded(page_header(transaction, META, 0, 0), &body));
    }
    file.extend(padded(page_header(2, FREELIST, 0, 0), &[]));
    file.extend(writer.pages);
    file
}

/// One element of a leaf page.
struct Item<'b> {
    flags: u32,
    key: &'b [u8],
    value: Vec<u8>,
}

impl Item<'_> {
    fn size(&self) -> usize {
        16 + self.key.len() + self.value.len()
    }
}

struct Writer {
    pages: Vec<u8>,
    /// Number of the next page.
    next: u64,
}

impl Writer {
    /// Writes a bucket's pages and gives the number of the one that the others are found from.
    fn bucket(&mut self, bucket: &Bucket) -> u64 {
        let items: Vec<_> = bucket.entries.iter().map(|(key, entry)| self.item(key, entry)).collect();
        let mut level = vec![];
        for items in in_pages(&items, 1, Item::size) {
            let first = items.first().map_or(&[][..], |item| item.key);
            level.push((first, self.page(LEAF, items.len(), &leaf_body(items))));
        }
        while level.len() > 1 {
            let mut above = vec![];
            // A branch of one child leads nowhere.
            for children in in_pages(&level, 2, |(key, _)| 16 + key.len()) {
                let first = children.first().map_or(&[][..], |(key, _)| *key);
                above.push((first, self.page(BRANCH, children.len(), &branch_body(children))));
            }
            level = above;
        }
        level.first().map_or(0, |(_, number)| *number)
    }

    fn item<'b>(&mut self, key: &'b [u8], entry: &'b Entry) -> Item<'b> {
        let bucket = match entry {
            Entry::Value(value) => return Item { flags: 0, key, value: value.clone() },
            Entry::Bucket(bucket) => bucket,
        };
        let (root, page) = match inline(bucket) {
            Some(page) => (0, page),
            None => (self.bucket(bucket), vec![]),
        };
        let value = [&root.to_le_bytes()[..], &bucket.sequence.to_le_bytes(), &page].concat();
        Item { flags: IS_BUCKET, key, value }
    }

    fn page(&mut self, kind: u16, count: usize, body: &[u8]) -> u64 {
        let number = self.next;
        let more = (PAGE_HEADER + body.len()).div_ceil(PAGE) - 1;
        self.pages.extend(padded(page_header(number, kind, count, more), body));
        self.next += more as u64 + 1;
        number
    }
}

/// The page of a small bucket without buckets, for its parent's page.
fn inline(bucket: &Bucket) -> Option<Vec<u8>> {
    let items: Option<Vec<_>> = bucket
        .entries
        .iter()
        .map(|(key, entry)| match entry {
            Entry::Value(value) => Some(Item { flags: 0, key, value: value.clone() }),
            Entry::Bucket(_) => None,
        })
        .collect();
    let items = items?;
    let size = PAGE_HEADER + items.iter().map(Item::size).sum::<usize>();
    (size <= MAX_INLINE).then(|| [page_header(0, LEAF, items.len(), 0), leaf_body(&items)].concat())
}

/// Divides what a level holds into pages of `least` elements or more; there is one page at least.
fn in_pages<T>(all: &[T], least: usize, size: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let mut pages = vec![];
    let (mut start, mut used) = (0, PAGE_HEADER);
    for (number, item) in all.iter().enumerate() {
        let size = size(item);
        if number - start >= least && used + size > PAGE {
            pages.push(&all[start..number]);
            (start, used) = (number, PAGE_HEADER);
        }
        used += size;
    }
    pages.push(&all[start..]);
    pages
}

fn leaf_body(items: &[Item<'_>]) -> Vec<u8> {
    let mut body = vec![];
    let mut place = items.len() * 16;
    for (number, item) in items.iter().enumerate() {
        let sizes = [item.flags as usize, place - number * 16, item.key.len(), item.value.len()];
        body.extend(sizes.map(le32).concat());
        place += item.key.len() + item.value.len();
    }
    for item in items {
        body.extend(item.key);
        body.extend(&item.value);
    }
    body
}

fn branch_body(children: &[(&[u8], u64)]) -> Vec<u8> {
    let mut body = vec![];
    let mut place = children.len() * 16;
    for (number, (key, page)) in children.iter().enumerate() {
        body.extend([place - number * 16, key.len()].map(le32).concat());
        body.extend(page.to_le_bytes());
        place += key.len();
    }
    for (key, _) in children {
        body.extend(*key);
    }
    body
}

fn page_header(number: u64, kind: u16, count: usize, more: usize) -> Vec<u8> {
    // A page of many elements is full long before 2^16 of them.
    [&number.to_le_bytes()[..], &kind.to_le_bytes(), &le32(count)[..2], &le32(more)].concat()
}

fn padded(mut header: Vec<u8>, body: &[u8]) -> Vec<u8> {
    header.extend(body);
    header.resize(header.len().next_multiple_of(PAGE), 0);
    header
}

/// The low 32 bits: nothing in a page is larger.
fn le32(number: usize) -> [u8; 4] {
    let [a, b, c, d, ..] = number.to_le_bytes();
    [a, b, c, d]
}

/// The hash of meta pages: 64 bits, FNV-1a.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], BoltError> {
    let found = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    found.copied().ok_or(BoltError("a page ends early"))
}

fn u16_at(bytes: &[u8], offset: usize) -> Result<u16, BoltError> {
    bytes_at(bytes, offset).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, BoltError> {
    bytes_at(bytes, offset).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, BoltError> {
    bytes_at(bytes, offset).map(u64::from_le_bytes)
}

/// What was read is the same when it was written. The bytes are the pages behind the first three, which are as they should
/// be.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut file = write(&Bucket::default());
    file.truncate(3 * PAGE);
    file.extend(bytes);
    for file in [bytes, &file] {
        if let Ok(root) = read(file) {
            assert_eq!(read(&write(&root)), Ok(root));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(depth: u32) -> BoxedStrategy<Bucket> {
        let value = prop::collection::vec(any::<u8>(), 0..600).prop_map(Entry::Value).boxed();
        let entry = if depth == 0 {
            value
        } else {
            prop_oneof![3 => value, 1 => bucket(depth - 1).prop_map(Entry::Bucket)].boxed()
        };
        let key = prop::collection::vec(any::<u8>(), 1..40);
        (any::<u64>(), prop::collection::btree_map(key, entry, 0..40))
            .prop_map(|(sequence, entries)| Bucket { sequence, entries })
            .boxed()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_written_is_read(bucket in bucket(2)) {
            let file = write(&bucket);
            prop_assert_eq!(file.len() % PAGE, 0);
            prop_assert_eq!(read(&file), Ok(bucket));
        }

        #[test]
        fn damaged_files_are_refused_or_read_but_never_end_the_program(
            bucket in bucket(1), places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)
        ) {
            let mut file = write(&bucket);
            for (place, byte) in places {
                let place = place.index(file.len());
                file[place] = byte;
            }
            let _ = read(&file);
        }
    }

    #[test]
    fn large_buckets_have_branches_and_large_values_several_pages() {
        let mut large = Bucket { sequence: 7, entries: BTreeMap::new() };
        for number in 0..3000_u32 {
            large.entries.insert(number.to_be_bytes().to_vec(), Entry::Value(vec![1; 200]));
        }
        large.entries.insert(b"long".to_vec(), Entry::Value(vec![2; 3 * PAGE]));
        let root = Bucket { sequence: 0, entries: BTreeMap::from([(b"v1".to_vec(), Entry::Bucket(large))]) };
        assert_eq!(read(&write(&root)), Ok(root));
    }

    #[test]
    fn buckets_that_share_what_they_hold_are_refused() {
        // Two keys, of the same bucket; its two are too, and so on: 2^30 values in the end.
        let mut bucket = leaf_body(&[Item { flags: 0, key: b"a", value: vec![] }]);
        let mut count = 1;
        for _ in 0..30 {
            let value = [&[0; BUCKET_HEADER][..], &page_header(0, LEAF, count, 0), &bucket].concat();
            let mut two = leaf_body(&[
                Item { flags: IS_BUCKET, key: b"a", value: value.clone() },
                Item { flags: IS_BUCKET, key: b"b", value: vec![] },
            ]);
            // The second one's key and value are those of the first.
            two.copy_within(4..16, 20);
            let place = le32(16);
            two[20..24].copy_from_slice(&place);
            two.truncate(2 * ELEMENT + 1 + value.len());
            (bucket, count) = (two, 2);
        }
        let mut file = write(&Bucket::default());
        let page = padded(page_header(3, LEAF, count, bucket.len() / PAGE), &bucket);
        file.truncate(3 * PAGE);
        file.extend(page);
        assert_eq!(read(&file), Err(BoltError("its values are in each other")));
    }

    #[test]
    fn other_files_are_refused() {
        for file in [&b""[..], b"SQLite format 3", &[0; 3 * PAGE]] {
            assert!(read(file).unwrap_err().to_string().contains("no valid meta page"));
        }
    }
}
