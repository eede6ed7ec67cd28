//! The adapters of a forward.

/// Adapters by name, each with a weight: `"sql"` is one at 1, `[("sql", 0.7), ("chat", 0.3)]` a weighted sum.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedAdapters(pub(super) Vec<(String, f64)>);

impl From<&str> for WeightedAdapters {
    fn from(name: &str) -> Self {
        Self(vec![(name.to_owned(), 1.)])
    }
}

impl From<&String> for WeightedAdapters {
    fn from(name: &String) -> Self {
        Self::from(name.as_str())
    }
}

impl<S: AsRef<str>> From<&[(S, f64)]> for WeightedAdapters {
    fn from(adapters: &[(S, f64)]) -> Self {
        let owned = adapters.iter().map(|(name, weight)| (name.as_ref().to_owned(), *weight));
        Self(owned.collect())
    }
}

impl<S: AsRef<str>, const N: usize> From<[(S, f64); N]> for WeightedAdapters {
    fn from(adapters: [(S, f64); N]) -> Self {
        Self::from(adapters.as_slice())
    }
}

impl<S: AsRef<str>> From<&Vec<(S, f64)>> for WeightedAdapters {
    fn from(adapters: &Vec<(S, f64)>) -> Self {
        Self::from(adapters.as_slice())
    }
}

impl<S: AsRef<str>> From<Vec<(S, f64)>> for WeightedAdapters {
    fn from(adapters: Vec<(S, f64)>) -> Self {
        Self::from(&adapters)
    }
}
