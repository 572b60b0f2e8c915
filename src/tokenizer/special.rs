//! Finds special tokens in a prompt: leftmost first, and the longest of those that begin there.

use std::collections::BTreeMap;

/// Longer texts are not looked for. It bounds the search to this many steps per byte of a prompt.
pub(super) const MAX_SPECIAL_BYTES: usize = 256;

/// A part of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part<'t> {
    /// Text between special tokens; never empty.
    Text(&'t str),
    /// A special token.
    Token(u32),
}

#[derive(Debug, Default)]
struct Node {
    /// Sorted by byte.
    next: Vec<(u8, usize)>,
    token: Option<u32>,
}

/// A byte trie of the special tokens' texts.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// `nodes[0]` is the root.
    nodes: Vec<Node>,
}

impl SpecialTokens {
    /// Empty texts are never matched; of a text given twice the first id counts.
    pub(super) fn new<'v>(specials: impl Iterator<Item = (&'v str, u32)>) -> Self {
        let mut texts: BTreeMap<&str, u32> = BTreeMap::new();
        let mut long = 0usize;
        for (text, id) in specials {
            if text.len() > MAX_SPECIAL_BYTES {
                long += 1;
            } else if !text.is_empty() {
                texts.entry(text).or_insert(id);
            }
        }
        if long > 0 {
            log::warn!(
                "{long} special tokens of more than {MAX_SPECIAL_BYTES} bytes are not looked for \
                 in prompts"
            );
        }
        let mut trie = Self { nodes: vec![Node::default()] };
        for (text, id) in texts {
            let mut node = 0;
            for byte in text.bytes() {
                let slot = position(&trie.nodes[node], byte);
                node = match slot {
                    Ok(at) => trie.nodes[node].next[at].1,
                    Err(at) => {
                        let child = trie.nodes.len();
                        trie.nodes[node].next.insert(at, (byte, child));
                        trie.nodes.push(Node::default());
                        child
                    }
                };
            }
            trie.nodes[node].token = Some(id);
        }
        trie
    }

    /// `text` as special tokens and what is between them.
    pub(super) fn split<'t>(&self, text: &'t str) -> Vec<Part<'t>> {
        let mut parts = Vec::new();
        let bytes = text.as_bytes();
        // A match begins and ends on a character boundary: its text is UTF-8, and so is the prompt.
        let (mut from, mut at) = (0, 0);
        while at < bytes.len() {
            match self.longest(&bytes[at..]) {
                Some((length, id)) => {
                    if from < at {
                        parts.push(Part::Text(&text[from..at]));
                    }
                    parts.push(Part::Token(id));
                    at += length;
                    from = at;
                }
                None => at += 1,
            }
        }
        if from < bytes.len() {
            parts.push(Part::Text(&text[from..]));
        }
        parts
    }

    /// The longest special token that `bytes` begins with: its length in bytes and its id.
    fn longest(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        let mut found = None;
        let mut node = 0;
        for (length, &byte) in (1..).zip(bytes) {
            let Ok(slot) = position(&self.nodes[node], byte) else { break };
            node = self.nodes[node].next[slot].1;
            if let Some(id) = self.nodes[node].token {
                found = Some((length, id));
            }
        }
        found
    }
}

fn position(node: &Node, byte: u8) -> Result<usize, usize> {
    node.next.binary_search_by_key(&byte, |&(byte, _)| byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_special_token_at_the_leftmost_place_wins() {
        let specials = SpecialTokens::new(
            [("<a>", 1), ("<a><b>", 2), ("<b>", 3), ("", 4), ("<b>", 5)].into_iter(),
        );
        assert_eq!(
            specials.split("x<a><b><b>é<a"),
            [Part::Text("x"), Part::Token(2), Part::Token(3), Part::Text("é<a")]
        );
    }

    #[test]
    fn a_near_miss_of_the_longest_token_falls_back_to_the_shorter_one() {
        let specials = SpecialTokens::new([("aa", 1), ("aaaab", 2)].into_iter());
        assert_eq!(specials.split("aaaac"), [Part::Token(1), Part::Token(1), Part::Text("c")]);
    }

    #[test]
    fn a_text_beyond_the_cap_is_not_looked_for() {
        let long = "Z".repeat(MAX_SPECIAL_BYTES + 1);
        let specials = SpecialTokens::new([(long.as_str(), 1)].into_iter());
        assert_eq!(specials.split(&long), [Part::Text(&long)]);
    }
}
