//! The reference cases of this repository and larger ones that lie elsewhere.

use super::base::root;
use super::cases::{Case, cases_in, stored_cases};

/// Those of Stable Diffusion 1.x and 2.x.
pub fn cases() -> Vec<Case> {
    let cases: Vec<Case> = all().into_iter().filter(|case| !is_xl(case)).collect();
    assert!(cases.len() >= 2, "both kinds of reference cases are in tests/fixtures/cases");
    cases
}

/// The cases of this repository, those beside it in `../shared`, and those in the folders of `HRA_CASES`.
pub fn all() -> Vec<Case> {
    let mut cases = stored_cases();
    cases.extend(["../shared", "../shared/cases"].iter().flat_map(|folder| cases_in(&root().join(folder))));
    cases.extend(std::env::var_os("HRA_CASES").iter().flat_map(|folder| cases_in(folder.as_ref())));
    cases
}

pub fn is_xl(case: &Case) -> bool {
    case.expected.shape("unet.pooled").is_some()
}
