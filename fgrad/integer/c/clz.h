/* How many zeros lead. */
static inline int32_t fgrad_clz(uint32_t x) {
  int32_t n = 0;
  if (x == 0) return 32;
  if (x < 0x10000u) { n += 16; x <<= 16; }
  if (x < 0x1000000u) { n += 8; x <<= 8; }
  if (x < 0x10000000u) { n += 4; x <<= 4; }
  if (x < 0x40000000u) { n += 2; x <<= 2; }
  return x < 0x80000000u ? n + 1 : n;
}
