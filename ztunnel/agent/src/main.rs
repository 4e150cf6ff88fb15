#![forbid(unsafe_code)]
#![allow(dead_code)]
mod capture;
mod listeners;
mod netns;
fn main() {}
