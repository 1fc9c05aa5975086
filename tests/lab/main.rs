//! The lab: comparisons, the towers that score, and reports with their page in a real browser.

#[path = "../support"]
mod support {
    pub mod background;
    pub mod base;
    pub mod finished;
    pub mod refused;
    pub mod scratch;
    pub mod training;
}

mod browser;
mod changes;
mod classifier;
mod compare;
mod comparison;
mod evaluate;
mod frontier;
mod orphans;
mod page;
mod report;
mod report_choices;
mod report_control;
mod run_scores;
mod towers;
