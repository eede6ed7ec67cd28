//! Which layers are adapted, by PEFT's rules for `target_modules` and `exclude_modules`.

use crate::formats::peft::Modules;
use crate::layers::ends_in;
use crate::regex::full_match;
use fancy_regex::Regex;
use std::collections::BTreeSet;

/// A selection of layers by name.
///
/// | from | selects |
/// |---|---|
/// | `["q_proj", "v_proj"]`, a list | layers whose path is a name or ends in it after a dot |
/// | `r".*\.self_attn\..*"`, a string | layers whose whole path matches the regular expression |
/// | `"all-linear"` or [`Targets::all_linear`] | every `Linear` but `lm_head`; exclude heads of other names |
#[derive(Debug, Clone)]
pub struct Targets(Rule);

#[derive(Debug, Clone)]
enum Rule {
    Names(BTreeSet<String>),
    /// Whole paths, of an adapter that was loaded.
    Paths(BTreeSet<String>),
    Regex(String, Result<Regex, String>),
    AllLinear,
}

impl Targets {
    /// Every `Linear` but the output head `lm_head` and modules that are trained as a whole.
    pub fn all_linear() -> Self {
        Self(Rule::AllLinear)
    }

    /// PEFT's `exclude_modules`, in which "all-linear" is no shorthand.
    pub(crate) fn excluded(modules: Modules) -> Self {
        match modules {
            Modules::Names(names) => names.into(),
            Modules::Expression(text) => Self::expression(&text),
        }
    }

    /// Python's `re.fullmatch`.
    fn expression(text: &str) -> Self {
        Self(Rule::Regex(text.to_owned(), full_match("", text)))
    }

    pub(crate) fn none() -> Self {
        Self(Rule::Names(BTreeSet::new()))
    }

    pub(crate) fn paths<'a>(paths: impl Iterator<Item = &'a String>) -> Self {
        Self(Rule::Paths(paths.cloned().collect()))
    }

    /// An error for an invalid regular expression.
    pub(crate) fn valid(&self) -> Result<(), String> {
        match &self.0 {
            Rule::Regex(text, Err(error)) => {
                Err(format!("the target {text:?} is not a regular expression: {error}"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn is_none(&self) -> bool {
        matches!(&self.0, Rule::Names(names) if names.is_empty())
    }

    pub(crate) fn is_all_linear(&self) -> bool {
        matches!(self.0, Rule::AllLinear)
    }

    /// Whether a layer's path is selected; an invalid regular expression selects nothing.
    pub(crate) fn matches(&self, path: &str) -> bool {
        match &self.0 {
            Rule::Names(names) => ends(path).any(|end| names.contains(end)),
            Rule::Paths(paths) => paths.contains(path),
            Rule::Regex(_, regex) => {
                regex.as_ref().is_ok_and(|regex| regex.is_match(path).unwrap_or(false))
            }
            Rule::AllLinear => !ends_in(path, "lm_head"),
        }
    }

    /// Why an expression does not tell whether it matches a path, if it takes too many steps.
    pub(crate) fn undecided(&self, path: &str) -> Option<String> {
        let Rule::Regex(text, Ok(regex)) = &self.0 else { return None };
        Some(format!("the target {text:?}: {}", regex.is_match(path).err()?))
    }

    /// Whether a name of the list is this whole path.
    pub(crate) fn names(&self, path: &str) -> bool {
        matches!(&self.0, Rule::Names(names) if names.contains(path))
    }

    /// An error for what selects none of the adapted layers. PEFT's own file of all linear layers lists those that it
    /// excludes, too.
    pub(crate) fn check<'a>(
        &self,
        adapted: impl Iterator<Item = &'a str>,
        excluded: &[String],
    ) -> Result<(), String> {
        let adapted: Vec<_> = adapted.collect();
        let unmatched: Vec<_> = match &self.0 {
            Rule::Names(names) => {
                let excluded = excluded.iter().map(String::as_str);
                let matched: BTreeSet<&str> =
                    adapted.iter().copied().chain(excluded).flat_map(ends).collect();
                names.iter().map(String::as_str).filter(|name| !matched.contains(name)).collect()
            }
            Rule::Regex(text, Ok(_)) if adapted.is_empty() => vec![text.as_str()],
            Rule::AllLinear if adapted.is_empty() => vec!["all-linear"],
            _ => vec![],
        };
        if unmatched.is_empty() {
            Ok(())
        } else {
            let how = match &self.0 {
                Rule::Regex(..) => ", as regular expressions of whole paths",
                _ => "",
            };
            Err(format!("the targets {unmatched:?} match no layer of the model{how}"))
        }
    }
}

/// What a path ends in, by whole components: itself, what comes after each dot, and the empty path.
fn ends(path: &str) -> impl Iterator<Item = &str> {
    let after_dots = path.match_indices('.').map(|(i, _)| &path[i + 1..]);
    [path].into_iter().chain(after_dots).chain([""])
}

impl From<Modules> for Targets {
    fn from(modules: Modules) -> Self {
        match modules {
            Modules::Names(names) => names.into(),
            Modules::Expression(text) => text.into(),
        }
    }
}

impl From<&str> for Targets {
    fn from(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") {
            return Self::all_linear();
        }
        Self::expression(text)
    }
}

impl From<String> for Targets {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

impl<S: Into<String>> From<Vec<S>> for Targets {
    fn from(names: Vec<S>) -> Self {
        Self(Rule::Names(names.into_iter().map(Into::into).collect()))
    }
}

impl<S: Into<String> + Clone> From<&[S]> for Targets {
    fn from(names: &[S]) -> Self {
        names.to_vec().into()
    }
}

impl<S: Into<String>, const N: usize> From<[S; N]> for Targets {
    fn from(names: [S; N]) -> Self {
        Vec::from(names).into()
    }
}
