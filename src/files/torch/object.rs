//! The objects of a pickle, which refer to each other by index.

/// The index of an object in its pickle.
pub(super) type Id = usize;

#[derive(Debug, PartialEq)]
pub(super) enum Object<'a> {
    None,
    Bool,
    Float,
    Int(i64),
    Text(&'a str),
    /// A module and a name in it.
    Class(&'a str, &'a str),
    Tuple(Vec<Id>),
    List,
    Dict(Vec<(Id, Id)>),
    /// A call of a class or function, not executed.
    Call(Id, Id),
    /// A reference to data outside the pickle.
    Persistent(Id),
}

impl Object<'_> {
    /// A description for error messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a bool",
            Self::Float | Self::Int(_) => "a number",
            Self::Text(_) => "a string",
            Self::Class(..) => "a class",
            Self::Tuple(_) => "a tuple",
            Self::List => "a list",
            Self::Dict(_) => "a dict",
            Self::Call(..) | Self::Persistent(_) => "an object",
        }
    }
}
