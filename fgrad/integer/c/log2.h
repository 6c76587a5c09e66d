/* log2(x) in units of 2**-16, for x from 1. */
static int32_t fgrad_log2(int32_t x) {
  const int32_t zeros = fgrad_clz((uint32_t)x);
  const int32_t mantissa = (int32_t)((uint32_t)x << (zeros - 1));
  const int32_t place = (mantissa >> 22) & 0xff, rest = (mantissa >> 8) & 0x3fff;
  const int32_t here = fgrad_logs[place], there = fgrad_logs[place + 1];
  const int32_t fraction = here + (((there - here) * rest + 0x2000) >> 14);
  return (int32_t)((uint32_t)(31 - zeros) << 16) + ((fraction + 8) >> 4);
}
