//! Arguments as Go's flag package reads them, and the variables beside them.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Arg, Command};

use super::FlagsError;

/// One flag that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Given {
    /// Its name without dashes.
    pub(super) name: String,
    /// Its value; a switch may have none.
    pub(super) value: Option<String>,
    /// The variable that it comes from, if it is not from the command line.
    pub(super) variable: Option<String>,
}

impl Given {
    /// In the one form that clap reads without doubt.
    pub(super) fn argument(&self) -> String {
        match &self.value {
            Some(value) => format!("--{}={value}", self.name),
            None => format!("--{}", self.name),
        }
    }

    /// For a switch: not turned off.
    pub(super) fn is_on(&self) -> bool {
        self.value
            .as_deref()
            .is_none_or(|value| boolean(value) != Ok(false))
    }

    /// As the user gave it, without the value, which may be secret.
    pub(super) fn origin(&self) -> String {
        self.variable
            .clone()
            .unwrap_or_else(|| format!("--{}", self.name))
    }
}

fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command
        .get_arguments()
        .find(|arg| arg.get_long() == Some(name))
}

/// A switch takes a value only with `=`.
fn is_switch(arg: &Arg) -> bool {
    arg.get_num_args()
        .is_some_and(|args| args.min_values() == 0)
}

fn is_repeatable(arg: &Arg) -> bool {
    matches!(arg.get_action(), clap::ArgAction::Append)
}

/// An empty value is what a flag without default holds anyway: not given. Templates leave
/// such values behind.
fn says_nothing(arg: &Arg, value: &str) -> bool {
    value.is_empty() && !is_repeatable(arg) && arg.get_default_values().is_empty()
}

/// `-x`, `--x`, `-x=v`, `-x v`; a flag that is not a switch takes the next argument
/// whatever it looks like.
pub(super) fn from_arguments(
    command: &Command,
    args: impl IntoIterator<Item = String>,
) -> Result<Vec<Given>, FlagsError> {
    let mut given = Vec::new();
    let mut args = args.into_iter();
    while let Some(argument) = args.next() {
        if argument == "--" {
            return match args.next() {
                Some(rest) => Err(FlagsError::Argument(rest)),
                None => Ok(given),
            };
        }
        let Some(flag) = argument.strip_prefix('-').filter(|flag| !flag.is_empty()) else {
            return Err(FlagsError::Argument(argument));
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, mut value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let name = if name == "h" { "help" } else { name };
        let arg = find(command, name);
        if let Some(arg) = arg
            && value.is_none()
            && !is_switch(arg)
        {
            value = args.next();
        }
        if let (Some(arg), Some(value)) = (arg, &value)
            && says_nothing(arg, value)
        {
            continue;
        }
        given.push(Given {
            name: name.to_owned(),
            value,
            variable: None,
        });
        if arg.is_none() {
            // What follows may be its value. clap names it, with the likeliest flag.
            break;
        }
    }
    Ok(given)
}

/// The variables of flags that the command line does not give; empty ones do not count.
pub(super) fn from_environment(
    command: &Command,
    line: &[Given],
    env: impl IntoIterator<Item = (String, String)>,
) -> Vec<Given> {
    let env: BTreeMap<String, String> = env.into_iter().collect();
    let on_line: BTreeSet<&str> = line.iter().map(|given| given.name.as_str()).collect();
    command
        .get_arguments()
        .filter_map(Arg::get_long)
        .filter(|name| !on_line.contains(name) && !matches!(*name, "help" | "version"))
        .filter_map(|name| {
            let variable = variable_of(name);
            let value = env.get(&variable).filter(|value| !value.is_empty())?;
            Some(Given {
                name: name.to_owned(),
                value: Some(value.clone()),
                variable: Some(variable),
            })
        })
        .collect()
}

/// `subnet-file` → `FLANNELD_SUBNET_FILE`.
fn variable_of(name: &str) -> String {
    format!(
        "FLANNELD_{}",
        name.to_ascii_uppercase().replace(['-', '.'], "_")
    )
}

/// The spellings of Go's `strconv.ParseBool`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("expected true or false".to_owned()),
    }
}

/// A number of Go's `strconv.ParseUint` with base 0: decimal, `0x…`, `0o…` or `0…`, `0b…`.
pub(super) fn integer(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.as_bytes() {
        [b'0', b'x', ..] => (&lower[2..], 16),
        [b'0', b'o', ..] => (&lower[2..], 8),
        [b'0', b'b', ..] => (&lower[2..], 2),
        [b'0', _, ..] => (&lower[1..], 8),
        _ => (lower.as_str(), 10),
    };
    if digits.starts_with('+') {
        return Err("expected a whole number".to_owned());
    }
    u64::from_str_radix(digits, radix).map_err(|_| "expected a whole number".to_owned())
}
