fn put_$ARRAY(e: u32, x: f32) {  // two in a word, which two tokens of a batch may share
  let shift = 16u * (e & 1u);
  atomicAnd(&$ARRAY[e / 2u], ~(0xffffu << shift));
  atomicOr(&$ARRAY[e / 2u], half_bits(x) << shift);
}
