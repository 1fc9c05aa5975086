//! Seeds: every random choice gets a number of its own from (run seed, purpose, index).
//!
//! So one image's noise does not depend on the batch size, previews do not disturb training, and a resumed run makes the
//! choices that it would have made. The arithmetic is part of the file formats: changing it changes every run. It is
//! SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") over FNV-1a of the purpose.

/// The odd number closest to 2^64 divided by the golden ratio: SplitMix64's step.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The seed for draw number `index` of one purpose (`"noise"`, `"crop"`, ..) in a run with `seed`.
///
/// It is output number `index` of the SplitMix64 stream that starts at `mix(mix(seed + GOLDEN) ^ fnv1a(purpose))`. For one
/// run and purpose no two indices share a number.
pub fn derive(seed: u64, purpose: &str, index: u64) -> u64 {
    let start = mix(mix(seed.wrapping_add(GOLDEN)) ^ fnv1a(purpose.as_bytes()));
    mix(start.wrapping_add(GOLDEN.wrapping_mul(index.wrapping_add(1))))
}

/// The numbers `0..n` in an order drawn by `seed`, all orders equally likely.
pub fn permutation(seed: u64, n: usize) -> Vec<usize> {
    let mut random = SplitMix64 { state: seed };
    let mut order: Vec<usize> = (0..n).collect();
    // Fisher and Yates, from the end.
    for last in (1..n).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    order
}

/// SplitMix64's finaliser, a bijection of 64-bit numbers.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a, 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A number below `n`. Draws from the incomplete last stretch of `n` numbers under 2^64 are thrown away: `%` would
    /// favour the small remainders.
    fn below(&mut self, n: u64) -> u64 {
        let tail = (u64::MAX % n + 1) % n;
        loop {
            let draw = self.next();
            if draw <= u64::MAX - tail {
                return draw % n;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn published_answers() {
        // The first outputs of Vigna's splitmix64.c for 1234567.
        let mut random = SplitMix64 { state: 1_234_567 };
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423_u64];
        assert_eq!(expected.map(|_| random.next()), expected);
        // Test vectors of the FNV draft.
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    /// Worked out by the formula of [`derive`] in Python. If this fails, old runs can no longer be continued.
    #[test]
    fn derived_seeds_never_change() {
        assert_eq!(derive(0, "noise", 0), DERIVED[0]);
        assert_eq!(derive(42, "crop", 7), DERIVED[1]);
        assert_eq!(derive(u64::MAX, "", u64::MAX), DERIVED[2]);
        assert_eq!(permutation(5, 8), PERMUTED);
    }
    const DERIVED: [u64; 3] = [0x0129_5307_a499_eca1, 0x8afe_3139_23b6_f41d, 0x7612_093a_0641_df34];
    const PERMUTED: [usize; 8] = [0, 7, 3, 1, 4, 6, 5, 2];

    #[test]
    fn every_order_of_three_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        let draws = 6000;
        for index in 0..draws {
            *counts.entry(permutation(derive(1, "order", index), 3)).or_insert(0_i64) += 1;
        }
        assert_eq!(counts.len(), 6);
        // 1000 each, standard deviation 29: five of them either way.
        assert!(counts.values().all(|n| (n - 1000).abs() < 145), "{counts:?}");
    }

    #[test]
    fn draws_below_a_bound_are_not_favoured() {
        // Of 3 * 2^62 numbers plain `% n` would give the lower third twice as often.
        let n = 3 << 62;
        let mut random = SplitMix64 { state: 9 };
        let low = (0..3000).filter(|_| random.below(n) < 1 << 62).count();
        assert!((870..1130).contains(&low), "{low}");
    }

    proptest! {
        #[test]
        fn a_permutation_holds_every_number_once(seed: u64, n in 0_usize..200) {
            let mut sorted = permutation(seed, n);
            prop_assert_eq!(&sorted, &permutation(seed, n));
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn indices_and_purposes_do_not_collide(seed: u64, a in 0_u64..10_000, b in 0_u64..10_000) {
            prop_assert_eq!(derive(seed, "x", a) == derive(seed, "x", b), a == b);
            prop_assert_ne!(derive(seed, "x", a), derive(seed, "y", b));
        }
    }
}
