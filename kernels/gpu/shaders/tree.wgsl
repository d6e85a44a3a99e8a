// $NAME: what 64 threads have, joined in the order of a tree: with that of the thread 32 behind, then 16, 8, 4, 2 and 1.
// Eight threads do the upper half of it and each the lower one, so that threads wait twice, not at every level.
var<workgroup> ${NAME}_of_64: array<$TYPE, 64>;
var<workgroup> ${NAME}_of_8: array<$TYPE, 8>;
fn $NAME(mine: $TYPE, t: u32) -> $TYPE {
  if (t < 64u) { ${NAME}_of_64[t] = mine; }
  workgroupBarrier();
  if (t < 8u) { ${NAME}_of_8[t] = $UPPER; }
  workgroupBarrier();
  return $LOWER;
}
