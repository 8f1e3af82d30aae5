// Reads the conformance vectors with Rust's own library: `rustc --edition 2021 -O read_vectors.rs && ./read_vectors FOLDER OPERATION < LINES`.
// A line asks for a tensor, as `quantize_4bit/nf4-size-1 inputs x`; the answer is its dtype, its shape, and its bytes in hexadecimal.
// The files never change, so that a search for text takes the place of a parser of JSON.
use std::{env, fs, io};

// ten lines
fn after<'a>(text: &'a str, mark: &str) -> &'a str {
    &text[text.find(mark).unwrap_or_else(|| panic!("no {mark}")) + mark.len()..]
}
fn tensor<'a>(json: &str, data: &'a [u8], case: &str, part: &str, name: &str) -> (&'a str, &'a str, &'a [u8]) {
    let key = after(after(after(json, &format!("\"id\": \"{case}\"")), &format!("\"{part}\": {{")), &format!("\"{name}\": "));
    let key = format!("\"t{}\":", after(key, "\"t").split('"').next().unwrap());
    let start = 8 + u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let entry = after(std::str::from_utf8(&data[8..start]).unwrap(), &key);
    let until = |mark, end| after(entry, mark).split(end).next().unwrap();
    let ends: Vec<usize> = until("\"data_offsets\":[", ']').split(',').map(|n| n.parse().unwrap()).collect();
    (until("\"dtype\":\"", '"'), until("\"shape\":[", ']'), &data[start + ends[0]..start + ends[1]])
}
// end

fn main() {
    let path = |end: &str| format!("{}/{}.{end}", env::args().nth(1).unwrap(), env::args().nth(2).unwrap());
    let json = fs::read_to_string(path("json")).unwrap();
    let data = fs::read(path("safetensors")).unwrap();
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let (dtype, shape, bytes) = tensor(&json, &data, words[0], words[1], words[2]);
        println!("{dtype} {shape} {}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    }
}
