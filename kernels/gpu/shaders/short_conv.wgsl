// A convolution along the tokens of a sequence; the rows before the batch are in the state, oldest first, and the last
// token writes the next one, unless others may still read there. What is convolved is x, or b * x of rows [b | c | x].
struct P { width: u32, group: u32, x_at: u32, x_row: u32, y_at: u32, y_row: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> w: array<f32>;
@group(0) @binding(2) var<storage, $ACCESS> states: array<f32>;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;$BIAS
var<immediate> p: P;
$FUNCTIONS
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let channel = g.x * 64u + t;
  if (channel >= p.width) { return; }
  let token = g.y;
  let start = b[b[4] + token];
  let slot = table_entry(p.group, token, 0u);
  var sum = 0.0;
  for (var k = 0u; k < $TAPS; k++) {
    let back = $TAPS - 1u - k;
    var u = 0.0;
    if (token >= start + back) {
      let row = p.x_at + (token - back) * p.x_row + channel;
      u = $VALUE;
    } else if (slot != 0xffffffffu) {
      u = states[(slot * ($TAPS - 1u) + token - start + k) * p.width + channel];
    }
    sum = fma(w[k * p.width + channel], u, sum);
  }
  y[p.y_at + token * p.y_row + channel] = $OUT;
  $KEEP
}
$KEEP_STATE
$STEP
