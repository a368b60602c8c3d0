//! Printing errors with everything that caused them.

use std::{error::Error, fmt};

/// Shows an error and its sources in one line. A source that the text before it already ends with is not repeated.
#[derive(Debug)]
pub struct Chain<'e>(pub &'e (dyn Error + 'e));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        f.write_str(&text)?;
        let mut next = self.0.source();
        while let Some(source) = next {
            let cause = source.to_string();
            if !text.ends_with(&cause) {
                write!(f, ": {cause}")?;
                text = cause;
            }
            next = source.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    #[test]
    fn names_each_cause_once() {
        let inner = Layer { text: "connection refused", source: None };
        let middle = Layer { text: "request failed: connection refused", source: Some(Box::new(inner)) };
        let outer = Layer { text: "can not fetch the manifest", source: Some(Box::new(middle)) };
        assert_eq!(Chain(&outer).to_string(), "can not fetch the manifest: request failed: connection refused");
    }
}
