//! Settings that are one of several words: the words, what each means, and what else each is called.

/// A value with its names.
pub struct Named<T> {
    pub value: T,
    /// As it is written.
    pub name: &'static str,
    /// Names that are accepted too.
    pub others: &'static [&'static str],
    /// What it is, for whoever has to choose.
    pub about: &'static str,
}

/// A [`Named`] in one line.
pub const fn named<T: Copy>(
    value: T,
    name: &'static str,
    others: &'static [&'static str],
    about: &'static str,
) -> Named<T> {
    Named { value, name, others, about }
}

/// One of several words, in files and on the command line.
pub trait Choice: Copy + PartialEq + 'static {
    /// All of them, in the order in which they are listed.
    const CHOICES: &'static [Named<Self>];

    /// Its name.
    fn word(self) -> &'static str {
        let named = Self::CHOICES.iter().find(|choice| choice.value == self);
        named.expect("every value is among the choices").name
    }

    /// The value of this name, in letters of either case.
    fn find(word: &str) -> Option<Self> {
        called(|name| name.eq_ignore_ascii_case(word))
    }

    /// The value of this name, in letters of its own case.
    fn find_exactly(word: &str) -> Option<Self> {
        called(|name| name == word)
    }
}

/// The value that has a name of which `is` says yes.
fn called<T: Choice>(is: impl Fn(&str) -> bool) -> Option<T> {
    let found = T::CHOICES.iter().find(|choice| is(choice.name) || choice.others.iter().any(|name| is(name)));
    found.map(|choice| choice.value)
}

/// A word to choose, without its value.
pub struct Word {
    /// As it is written.
    pub name: &'static str,
    /// Names that are accepted too.
    pub others: &'static [&'static str],
    /// What it is, for whoever has to choose; may be empty.
    pub about: &'static str,
}

/// The words of a choice, in the order in which they are listed.
pub fn words<T: Choice>() -> Vec<Word> {
    T::CHOICES
        .iter()
        .map(|choice| Word { name: choice.name, others: choice.others, about: choice.about })
        .collect()
}
