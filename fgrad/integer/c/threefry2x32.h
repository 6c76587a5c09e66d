/* The block cipher behind JAX's random keys, 20 rounds (Salmon et al., SC 2011). */
static void fgrad_threefry2x32(uint32_t k0, uint32_t k1, uint32_t x0, uint32_t x1,
                               uint32_t *y0, uint32_t *y1) {
  static const uint8_t turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  const uint32_t keys[3] = {k0, k1, k0 ^ k1 ^ 0x1bd11bdau};
  uint32_t i;
  x0 += keys[0];
  x1 += keys[1];
  for (i = 0; i < 20; ++i) {
    const uint32_t turn = turns[i % 8];
    x0 += x1;
    x1 = ((x1 << turn) | (x1 >> (32 - turn))) ^ x0;
    if (i % 4 == 3) {
      const uint32_t round = i / 4 + 1;
      x0 += keys[round % 3];
      x1 += keys[(round + 1) % 3] + round;
    }
  }
  *y0 = x0;
  *y1 = x1;
}
