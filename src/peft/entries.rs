//! The entries of a JSON object in the order of the file, which decides between patterns that match the same
//! layer. `serde_json::Map` sorts them.

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::collections::HashMap;
use std::fmt;

/// The entries; of a repeated key the last value, at the place of the first, as in Python.
#[derive(Debug, Default)]
pub(super) struct Entries(pub Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InOrder)
    }
}

struct InOrder;

impl<'de> Visitor<'de> for InOrder {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let (mut entries, mut places) = (vec![], HashMap::new());
        while let Some((key, value)) = map.next_entry::<String, Value>()? {
            let place = *places.entry(key.clone()).or_insert(entries.len());
            match entries.get_mut(place) {
                Some(entry) => *entry = (key, value),
                None => entries.push((key, value)),
            }
        }
        Ok(Entries(entries))
    }
}
