//! A JSON object as flannel reads one: keys match without regard to case, the
//! last of several wins, unknown keys are ignored and `null` counts as absent.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// The members of one object in document order, their values still text.
pub(crate) struct JsonObject(Vec<(String, Box<RawValue>)>);

/// A member whose value has another type than its key demands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}, expected {expected}")]
pub struct WrongType {
    /// The key as flannel's documentation spells it.
    pub key: &'static str,
    /// The JSON text found.
    pub value: String,
    /// What would have been right.
    pub expected: &'static str,
}

impl JsonObject {
    /// The error names line and column.
    pub(crate) fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The text of `key`'s value.
    pub(crate) fn raw(&self, key: &str) -> Option<&RawValue> {
        self.0
            .iter()
            .rev()
            .find(|(name, value)| name.eq_ignore_ascii_case(key) && value.get() != "null")
            .map(|(_, value)| &**value)
    }

    /// The value of `key`; `expected` describes the type in the error.
    pub(crate) fn get<T: DeserializeOwned>(
        &self,
        key: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, WrongType> {
        self.raw(key)
            .map(|raw| {
                serde_json::from_str(raw.get()).map_err(|_| WrongType {
                    key,
                    value: raw.get().to_owned(),
                    expected,
                })
            })
            .transpose()
    }
}

impl<'de> Deserialize<'de> for JsonObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = JsonObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(JsonObject(members))
            }
        }

        deserializer.deserialize_map(Members)
    }
}

/// The same value without white space between its tokens, as Go writes it.
pub(crate) fn compact(raw: &RawValue) -> Box<RawValue> {
    let mut text = String::with_capacity(raw.get().len());
    let (mut in_string, mut escaped) = (false, false);
    for c in raw.get().chars() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if c.is_ascii_whitespace() {
            continue;
        } else {
            in_string = c == '"';
        }
        text.push(c);
    }
    RawValue::from_string(text).unwrap_or_else(|_| raw.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> JsonObject {
        JsonObject::parse(text).expect("an object")
    }

    #[test]
    fn keys_match_without_case_and_the_last_wins() {
        let object = object(r#"{"network":"a","NETWORK":"b","Network":null}"#);
        assert_eq!(object.get("Network", "text"), Ok(Some("b".to_owned())));
        assert_eq!(object.get::<String>("Other", "text"), Ok(None));
    }

    #[test]
    fn a_wrong_type_names_key_value_and_expectation() {
        let error = object(r#"{"subnetlen":"24"}"#)
            .get::<u32>("SubnetLen", "a number")
            .expect_err("a string is no number");
        assert_eq!(error.to_string(), "SubnetLen is \"24\", expected a number");
    }

    #[test]
    fn what_is_no_object_is_refused_with_its_place() {
        let error = JsonObject::parse("[1]").err().expect("no object");
        assert!(error.to_string().contains("a JSON object"), "{error}");
        let error = JsonObject::parse("{\n\"a\": }").err().expect("torn");
        assert!(error.to_string().contains("line 2 column"), "{error}");
    }

    #[test]
    fn compaction_leaves_strings_alone() {
        let raw: Box<RawValue> =
            serde_json::from_str("{ \"a\" : [ 1 , \"x \\\" , y\\\\\" , 2 ] }").expect("JSON");
        assert_eq!(compact(&raw).get(), r#"{"a":[1,"x \" , y\\",2]}"#);
    }
}
