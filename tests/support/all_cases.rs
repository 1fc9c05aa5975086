//! The reference cases of this repository and larger ones that lie elsewhere.

use super::base::root;
use super::cases::{Case, cases_in, stored_cases};

/// The cases of this repository, those beside it in `../shared/cases`, and those in the folders of `HRA_CASES`.
pub fn cases() -> Vec<Case> {
    let mut cases = stored_cases();
    cases.extend(cases_in(&root().join("../shared/cases")));
    cases.extend(std::env::var_os("HRA_CASES").iter().flat_map(|folder| cases_in(folder.as_ref())));
    assert!(cases.len() >= 2, "both kinds of reference cases are in tests/fixtures/cases");
    cases
}
