//! What a refusal says.

pub fn refused(problem: hra::Error, words: &[&str]) {
    let text = problem.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in:\n{text}");
}
