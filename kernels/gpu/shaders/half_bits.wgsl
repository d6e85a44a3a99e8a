fn half_bits(x: f32) -> u32 {  // float16, nearest, ties to even; pack2x16float may round otherwise
  let bits = bitcast<u32>(x);
  let sign = (bits >> 16u) & 0x8000u;
  let a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) { return sign | 0x7e00u; }
  if (a >= 0x477ff000u) { return sign | 0x7c00u; }
  if (a < 0x38800000u) { return sign | (bitcast<u32>(bitcast<f32>(a) + 0.5) - 0x3f000000u); }
  return sign | ((a + 0xc8000fffu + ((a >> 13u) & 1u)) >> 13u);
}
