// The last rows of each sequence that short_conv.wgsl convolves, as its state.
struct P { width: u32, group: u32, x_at: u32, x_row: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> states: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let channel = g.x * 64u + t;
  let token = g.y;
  let start = b[b[4] + token];
  if (channel >= p.width || (token + 1u < b[0] && b[b[4] + token + 1u] == start)) { return; }  // not its last token
  let slot = table_entry(p.group, token, 0u);
  let to = table_entry(p.group, token, 1u);
  for (var k = 0u; k < $TAPS - 1u; k++) {  // row k comes from row k + n of the old state: in this order none is lost
    let back = $TAPS - 2u - k;
    var u = 0.0;
    if (token >= start + back) {
      let row = p.x_at + (token - back) * p.x_row + channel;
      u = $VALUE;
    } else if (slot != 0xffffffffu) {
      u = states[(slot * ($TAPS - 1u) + token - start + 1u + k) * p.width + channel];
    }
    states[(to * ($TAPS - 1u) + k) * p.width + channel] = u;
  }
}
$STEP
