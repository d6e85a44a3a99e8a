// What 16 codes stand for, four signed bytes a word.
fn level(code: u32) -> i32 {
  let four = select(select($L0, $L1, (code & 4u) != 0u), select($L2, $L3, (code & 4u) != 0u), (code & 8u) != 0u);
  return bitcast<i32>(four << (24u - 8u * (code & 3u))) >> 24u;
}
fn levels(codes: u32) -> vec4<f32> {
  return vec4<f32>(vec4<i32>(level(codes & 15u), level((codes >> 8u) & 15u), level((codes >> 16u) & 15u), level(codes >> 24u)));
}
