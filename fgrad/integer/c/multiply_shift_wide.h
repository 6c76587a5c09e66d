/* The same where the product needs up to 46 bits; s is at least 16, m below 2**15. */
static inline int32_t fgrad_multiply_shift_wide(int32_t q, int32_t m, int32_t s) {
  const int32_t high = q >> 15, low = q & 0x7fff;
  const int32_t half = (int32_t)(1u << (s - 16));
  return (high * m + (low * m >> 15) + half) >> (s - 15);
}
