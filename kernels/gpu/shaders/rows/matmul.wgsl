// matmul.wgsl for one column and few rows
let lane = t % $LANES;
let slice = t / $LANES;
let own = $BEGIN + min(lane, $N - 1u);
let per = ($PIECES + $SLICES - 1u) / $SLICES;
$START
$SUMS
$KEEP
workgroupBarrier();
if (t < $N) {
  var sum = 0.0;
  for (var i = 0u; i < $SLICES; i++) { sum += part[i * $LANES + t]; }
  $z[z + t] = sum;
}
