// A whole number for the bits of a float32: they are in the same order, and the two zeros are one.
fn key(bits: u32) -> u32 {
  if (bits == 0x80000000u) { return bits; }
  return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}
fn unkey(k: u32) -> u32 { return select(~k, k & 0x7fffffffu, (k >> 31u) == 1u); }
