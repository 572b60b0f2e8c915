//! Stop strings: text ends before the first of them, wherever tokens cut it.

/// Watches text as it comes, and holds back what may be the begin of a stop string.
pub(crate) struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    pub(crate) fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, held: String::new() }
    }

    /// Takes `piece`; gives what can be shown now, and whether the text has ended.
    pub(crate) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s)).min() {
            let shown = self.held[..at].to_owned();
            self.held.clear();
            return (shown, true);
        }
        let begins = |rest: &str| self.stops.iter().any(|s| s.starts_with(rest));
        let starts = self.held.char_indices().map(|(at, _)| at);
        let keep = starts.into_iter().find(|at| begins(&self.held[*at..]));
        let held = self.held.split_off(keep.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, held), false)
    }

    /// What was held back, when no more text comes.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes `pieces`; what was shown, and after how many pieces the text ended.
    fn shown(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut watch = StopStrings::new(&stops);
        let mut all = String::new();
        for (i, piece) in pieces.iter().enumerate() {
            let (text, ended) = watch.push(piece);
            all.push_str(&text);
            if ended {
                return (all + &watch.finish(), Some(i + 1));
            }
        }
        (all + &watch.finish(), None)
    }

    #[test]
    fn text_ends_before_the_first_stop_string_however_it_is_cut() {
        assert_eq!(shown(&["END"], &["abENDcd"]), ("ab".to_owned(), Some(1)));
        assert_eq!(shown(&["END"], &["abE", "N", "Dcd"]), ("ab".to_owned(), Some(3)));
        assert_eq!(shown(&["x", "b"], &["abx"]), ("a".to_owned(), Some(1)));
        assert_eq!(shown(&["é!"], &["caf", "é", "!"]), ("caf".to_owned(), Some(3)));
    }

    #[test]
    fn what_only_begins_like_one_is_shown_in_the_end() {
        assert_eq!(shown(&["END"], &["E", "NE", "N"]), ("ENEN".to_owned(), None));
        assert_eq!(shown(&[], &["a", "b"]), ("ab".to_owned(), None));
        assert_eq!(shown(&[""], &["a"]), ("a".to_owned(), None));
        assert_eq!(shown(&["aab"], &["a", "a", "a", "b"]), ("a".to_owned(), Some(4)));
    }
}
