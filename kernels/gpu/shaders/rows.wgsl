// Ops over the row of a token, one after another, each through the buffers that it has alone: so it has the same bits.
// The first 64 threads add up what trees have the order of, all of them do what is done number by number.
struct P { $FIELDS }
$BINDINGS
var<immediate> p: P;
var<workgroup> part: array<f32, $SLICES * $LANES>;
$FUNCTIONS
$TOTAL
@compute @workgroup_size($SLICES * $LANES)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let row = g.x;
  let first = select(0xffff0000u, t, t < 64u);
  $OPS
}
