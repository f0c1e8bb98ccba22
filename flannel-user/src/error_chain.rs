//! An error with its causes, for texts that hold both.

use std::{error::Error, iter::successors};

/// The error and its causes in one line, outermost first; a cause that says nothing new is left
/// out.
pub(crate) fn in_one_line(error: &dyn Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in successors(Some(error), |error| (*error).source()) {
        let text = cause.to_string();
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Level {
        text: &'static str,
        source: Option<Box<Level>>,
    }

    fn chain(texts: &[&'static str]) -> Option<Box<Level>> {
        let (text, rest) = texts.split_first()?;
        let source = chain(rest);
        Some(Box::new(Level { text, source }))
    }

    #[test]
    fn every_cause_is_named_once() {
        for (texts, line) in [
            (&["cannot read"][..], "cannot read"),
            (
                &["cannot read", "no file", "gone"],
                "cannot read: no file: gone",
            ),
            (
                &["cannot read: gone", "gone", "why"],
                "cannot read: gone: why",
            ),
        ] {
            assert_eq!(in_one_line(&*chain(texts).expect("an error")), line);
        }
    }
}
