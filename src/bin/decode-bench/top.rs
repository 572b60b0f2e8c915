//! The largest logits of a step, for `--top`.

/// The `n` largest logits with their ids, largest first; of equal ones the smaller id first.
pub(crate) fn top(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let n = n.min(all.len());
    if n < all.len() {
        all.select_nth_unstable_by(n, order);
        all.truncate(n);
    }
    all.sort_unstable_by(order);
    all
}

#[cfg(test)]
mod tests {
    use super::top;

    #[test]
    fn the_largest_come_first_and_of_equal_ones_the_smaller_id() {
        let logits = [0.0, 3.0, 1.0, 3.0, 2.0];
        assert_eq!(top(&logits, 3), [(1, 3.0), (3, 3.0), (4, 2.0)]);
        assert_eq!(top(&logits, 99).len(), 5);
    }
}
