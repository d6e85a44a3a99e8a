"""Byte offsets in the record of the top-k kernel (kernels/top_k.py). A call fills a row of results and moves on.

    inputs     logits, float32, and how many | k: so many of the largest are wanted | 1 if the sum of exp is wanted
    the draw   links (kind, amount, least that stays; float64) of a chain, how many | candidates that enter it, 0 for
               no draw | address of the next uniform number in [0, 1), float64
    results    addresses of the next row of each: numbers (ROW below), positions int64 (k), values float32 (k), what the
               chain made of the logits float64 (candidates), how many each link left int64 (links)
    bans       address of the ids that are no candidates, int64, and how many; k is then as much larger

The addresses of results, and of uniform numbers when one was used, stand one row further after a call.
"""

LOGITS, N_LOGITS, K, WANTS_SUM, LINKS, N_LINKS, N_CANDIDATES, UNIFORMS = (8 * i for i in range(8))
ROW, POSITIONS, VALUES, SHAPED, LEFT, BANNED, N_BANNED = (64 + 8 * i for i in range(7))
FIELDS = 15

# ---- the numbers of a row: sum of the logits, sum of exp(logit - largest), sum of exp(shaped - first) of those left,
#      float64; the token that was drawn, -1 where a logit is not finite, and its place among the k, int64
PLAIN_SUM, SUM, SHAPED_SUM, TOKEN, PLACE = (8 * i for i in range(5))
ROW_FIELDS = 8
ROW_NBYTES = 8 * ROW_FIELDS

LINK_NBYTES = 24
TOP_K, TOP_P, MIN_P, TEMPERATURE = range(4)  # kinds of links; their amounts are those of ``kernels.draw.Link``
LINKS_BY_NAME = {"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P, "temperature": TEMPERATURE}
