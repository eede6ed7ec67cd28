//! Reads a pickle as data, without executing it.
//!
//! Python's protocol 2, which `torch.save` writes. Objects refer to each other by index, so that sharing
//! and nesting cost no more memory than the pickle's length. candle's own reader copies shared objects,
//! allocates what a damaged length asks for, and skips what it does not know.

use super::bytes::{array, line, long, take, utf8};
use super::object::{Id, Object};
use std::collections::HashMap;

#[derive(Debug, Default)]
pub(super) struct Pickle<'a> {
    objects: Vec<Object<'a>>,
    stack: Vec<Id>,
    /// The height of the stack at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

type Result<T> = std::result::Result<T, String>;

impl<'a> Pickle<'a> {
    /// Reads the pickle and returns the index of its object.
    pub fn read(mut bytes: &'a [u8]) -> Result<(Self, Id)> {
        let mut pickle = Self::default();
        let length = bytes.len();
        loop {
            let at = length - bytes.len();
            match pickle.step(&mut bytes) {
                Ok(false) => {}
                Ok(true) => {
                    let root = pickle.pop()?;
                    return Ok((pickle, root));
                }
                Err(reason) => return Err(format!("{reason} (at byte {at} of data.pkl)")),
            }
        }
    }

    pub fn get(&self, id: Id) -> &Object<'a> {
        self.objects.get(id).unwrap_or(&Object::None)
    }

    /// Executes one operation; returns whether it was the last.
    fn step(&mut self, rest: &mut &'a [u8]) -> Result<bool> {
        let [op] = array(rest)?;
        match op {
            0x80 => drop(array::<1>(rest)?),
            b'c' => {
                let (module, name) = (line(rest)?, line(rest)?);
                self.push(Object::Class(module, name));
            }
            b'N' => self.push(Object::None),
            0x88 | 0x89 => self.push(Object::Bool),
            b'K' => self.push(Object::Int(array::<1>(rest)?[0].into())),
            b'M' => self.push(Object::Int(u16::from_le_bytes(array(rest)?).into())),
            b'J' => self.push(Object::Int(i32::from_le_bytes(array(rest)?).into())),
            0x8a => {
                let [n] = array(rest)?;
                self.push(Object::Int(long(take(rest, n.into())?)?));
            }
            b'G' => {
                array::<8>(rest)?;
                self.push(Object::Float);
            }
            b'X' => {
                let n = u32::from_le_bytes(array(rest)?);
                self.push(Object::Text(utf8(take(rest, n as usize)?)?));
            }
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.push(Object::Tuple(vec![])),
            0x85..=0x87 => {
                let from = self.stack.len().checked_sub(usize::from(op - 0x84));
                let items = self
                    .stack
                    .split_off(from.ok_or("a tuple needs more objects than the stack has")?);
                self.push(Object::Tuple(items));
            }
            b't' => {
                let items = self.marked()?;
                self.push(Object::Tuple(items));
            }
            b']' => self.push(Object::List),
            b'a' => drop(self.pop()?),
            b'e' => drop(self.marked()?),
            b'}' => self.push(Object::Dict(vec![])),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.add(&[(key, value)])?;
            }
            b'u' => {
                let items = self.marked()?;
                let pairs = items.chunks_exact(2);
                if !pairs.remainder().is_empty() {
                    return Err("a key has no value".to_owned());
                }
                let pairs: Vec<_> = pairs.map(|pair| (pair[0], pair[1])).collect();
                self.add(&pairs)?;
            }
            b'R' | 0x81 => {
                let (args, class) = (self.pop()?, self.pop()?);
                self.push(match (self.get(class), self.get(args)) {
                    (Object::Class("collections", "OrderedDict"), Object::Tuple(items)) => {
                        if !items.is_empty() {
                            let reason =
                                "an OrderedDict is made of arguments, which torch does not write";
                            return Err(reason.to_owned());
                        }
                        Object::Dict(vec![])
                    }
                    _ => Object::Call(class, args),
                });
            }
            // An object's attributes: what a state dict has there (`_metadata`) is no tensor.
            b'b' => drop(self.pop()?),
            b'Q' => {
                let id = self.pop()?;
                self.push(Object::Persistent(id));
            }
            b'q' => self.put(array::<1>(rest)?[0].into())?,
            b'r' => self.put(u32::from_le_bytes(array(rest)?))?,
            b'h' => self.recall(array::<1>(rest)?[0].into())?,
            b'j' => self.recall(u32::from_le_bytes(array(rest)?))?,
            b'.' => return Ok(true),
            op => return Err(format!("the operation {op:#04x} is not one that torch writes")),
        }
        Ok(false)
    }

    fn push(&mut self, object: Object<'a>) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    fn pop(&mut self) -> Result<Id> {
        self.stack.pop().ok_or_else(|| "an object is missing".to_owned())
    }

    /// The objects since the last mark.
    fn marked(&mut self) -> Result<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => Err("a mark is missing".to_owned()),
        }
    }

    /// Adds items to a dict. Those of another object are not kept: training options, in a class derived from
    /// a dict.
    fn add(&mut self, pairs: &[(Id, Id)]) -> Result<()> {
        match self.stack.last().and_then(|&id| self.objects.get_mut(id)) {
            Some(Object::Dict(items)) => {
                items.extend(pairs);
                Ok(())
            }
            Some(Object::Call(..)) => Ok(()),
            _ => Err("an item is added to an object that is not a dict".to_owned()),
        }
    }

    fn put(&mut self, key: u32) -> Result<()> {
        let id = *self.stack.last().ok_or("the stack is empty")?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<()> {
        let id = *self.memo.get(&key).ok_or_else(|| format!("nothing was memoized as {key}"))?;
        self.stack.push(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its items would be lost.
    #[test]
    fn a_dict_that_is_made_of_arguments_is_an_error() {
        let read = |args: &[u8]| {
            let bytes = [b"\x80\x02ccollections\nOrderedDict\n", args, b"R."].concat();
            Pickle::read(&bytes).map(drop)
        };
        assert_eq!(read(b")"), Ok(()));
        assert!(read(b"]\x85").unwrap_err().contains("OrderedDict"));
    }
}
