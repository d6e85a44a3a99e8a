// conv_state.wgsl behind short_conv.wgsl, where other tokens of the step read the slot that is written.
struct P { width: u32, group: u32, x_at: u32, x_row: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> states: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let channel = g.x * 64u + t;
  if (channel < p.width) { keep_state(g.y, channel); }
}
$KEEP_STATE
$STEP
