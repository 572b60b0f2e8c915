//! Which regular expressions a folder's tokenizer may cut text with: those that an automaton matches,
//! in time linear in the text.
//!
//! The matcher behind `tokenizers` backtracks over what automata cannot express: looks around, back
//! references, atomic groups and possessive repetitions. Of these published patterns have one,
//! the alternative `\s+(?!\S)` beside others, which goes back by one character. It is let through; a
//! pattern with any other may take exponentially long and is refused.

/// The alternative that steps back once.
const SPACES_BUT_THE_LAST: &str = r"\s+(?!\S)";

/// Whether `pattern` has nothing that is backtracked over without bound.
pub(super) fn is_linear(pattern: &str) -> bool {
    alternatives(pattern).iter().all(|one| *one == SPACES_BUT_THE_LAST || is_regular(one))
}

/// A token of a pattern, as far as it matters here.
#[derive(Clone, Copy, PartialEq)]
enum Token {
    /// A character or class: matches something by itself.
    Atom,
    /// `*`, `+`, `?` or `}`, but for a `+` behind one of them.
    Repetition,
    /// `|` outside all groups.
    Alternative,
    /// A group that no automaton has, `\1`, `\G`; a `+` behind a repetition.
    Irregular,
    /// `(` and `)`, and what makes a group one of its own kind.
    Group,
}

/// The tokens of `pattern`, each with the byte at which it begins.
fn tokens(pattern: &str) -> Vec<(usize, Token)> {
    let (mut found, mut depth, mut class) = (Vec::new(), 0usize, 0usize);
    let mut rest = pattern.char_indices();
    while let Some((at, c)) = rest.next() {
        let behind = rest.as_str();
        let token = match c {
            '\\' => match rest.next() {
                Some((_, '1'..='9' | 'k' | 'g' | 'G' | 'K')) if class == 0 => Token::Irregular,
                // `\p{L}`, `\x{10ffff}`: the brace is no repetition's.
                Some((_, 'p' | 'P' | 'x' | 'u' | 'U')) if rest.as_str().starts_with('{') => {
                    let _ = rest.by_ref().find(|(_, c)| *c == '}');
                    Token::Atom
                }
                _ => Token::Atom,
            },
            '[' => {
                // The first `]` of a class is itself, not of one in a class.
                let head = behind.strip_prefix('^').unwrap_or(behind);
                if class == 0 && head.starts_with(']') {
                    let _ = rest.nth(behind.len() - head.len());
                }
                class += 1;
                Token::Atom
            }
            // In a class too: what a class is, is the matcher's to say.
            '(' if is_irregular_group(behind) => Token::Irregular,
            ']' if class > 0 => {
                class -= 1;
                Token::Atom
            }
            _ if class > 0 => Token::Atom,
            '(' => {
                depth += 1;
                if behind.starts_with('?') {
                    // Is no repetition.
                    rest.next();
                }
                Token::Group
            }
            ')' => {
                depth = depth.saturating_sub(1);
                Token::Group
            }
            '|' if depth == 0 => Token::Alternative,
            '+' if found.last().is_some_and(|(_, t)| *t == Token::Repetition) => Token::Irregular,
            '*' | '+' | '?' | '}' => Token::Repetition,
            _ => Token::Atom,
        };
        found.push((at, token));
    }
    found
}

/// Whether a group that begins with `behind` is none of an automaton's, or may hide one: a comment, or
/// the flag for comments.
fn is_irregular_group(behind: &str) -> bool {
    let Some(kind) = behind.strip_prefix('?') else { return false };
    let irregular = ["=", "!", "<=", "<!", ">", "(", "P=", "P>", "|", "#"];
    let flags = kind.trim_start_matches(|c: char| c.is_ascii_alphabetic() || c == '-');
    let comments = kind[..kind.len() - flags.len()].contains('x') && flags.starts_with([':', ')']);
    comments || irregular.iter().any(|i| kind.starts_with(i))
}

fn alternatives(pattern: &str) -> Vec<&str> {
    let bars = tokens(pattern).into_iter().filter(|(_, t)| *t == Token::Alternative);
    let mut begin = 0;
    let mut found: Vec<&str> = bars
        .map(|(at, _)| {
            let one = &pattern[begin..at];
            begin = at + 1;
            one
        })
        .collect();
    found.push(&pattern[begin..]);
    found
}

fn is_regular(pattern: &str) -> bool {
    tokens(pattern).iter().all(|(_, t)| *t != Token::Irregular)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_patterns_are_linear() {
        for pattern in [
            // GPT-2, Llama 3, Qwen2, o200k, DeepSeek, Mistral's Tekken, StarCoder, plain ones.
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
            r" ?[^(\s|[.,!?…。，、।۔،])]+",
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"\+\++|a+?b*?|[]a]+|[^]a]+|(?P<n>a)|(?<m>b)|(?s-i:c)",
            "",
        ] {
            assert!(is_linear(pattern), "{pattern}");
        }
    }

    #[test]
    fn what_backtracks_without_bound_is_not_linear() {
        for pattern in [
            r"(a|aa)+(?!x)$",
            r"(?:a|aa|\s+(?!\S))+$",
            r"\s+(?!\S)+",
            r"x\s+(?!\S)",
            r"(?=a)b",
            r"(?<=a)b|c",
            r"(?<!a)b",
            r"(a*)*\1",
            r"(?<n>a*)\k<n>",
            r"(?>a*)a",
            r"a++b",
            r"a{2}+b",
            r"[a](?!b)",
            r"[]a](?!b)",
            r"\[(?!b)",
            r"(a)?(?(1)b|c)",
            r"\Ga",
            r"\+{2}+b",
            r"[[]a](a|aa)+(?!x)$]",
            r"(?#[)(a|aa)+(?!x)$",
            "(?x)#[\n(a|aa)+(?!x)$",
            r"(?i-x:a)",
        ] {
            assert!(!is_linear(pattern), "{pattern}");
        }
    }
}
