/* How many bits are set. */
static inline int32_t fgrad_population_count(uint32_t x) {
  x -= (x >> 1) & 0x55555555u;
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0fu;
  return (int32_t)((x * 0x01010101u) >> 24);
}
