//! Lists of ranges that may name too much, never too little.

use shootdown_core::AddrRange;

/// Sorts, joins neighbours, and widens over the gaps until at most `most` are left.
pub(crate) fn at_most(ranges: &mut Vec<AddrRange>, most: usize) {
    if ranges.len() < 2 {
        return;
    }
    ranges.sort_unstable();
    ranges.dedup_by(|next, so_far| {
        let touches = so_far.touches(*next);
        if touches {
            *so_far = so_far.hull(*next);
        }
        touches
    });
    if ranges.len() > most {
        let group = ranges.len().div_ceil(most);
        *ranges =
            ranges.chunks(group).map(|part| part.iter().copied().fold(part[0], AddrRange::hull)).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_widened_and_nothing_is_lost() {
        let range = |page: u64| AddrRange::new(page << 12, (page + 1) << 12).unwrap();
        for count in 1..40 {
            for most in 1..10 {
                let given: Vec<_> = (0..count).rev().map(|page| range(page * 3)).collect();
                let mut kept = given.clone();
                at_most(&mut kept, most);
                assert!(kept.len() <= most);
                assert!(given.iter().all(|page| kept.iter().any(|wide| wide.contains(*page))));
            }
        }
    }
}
