/* A hash of all of a slot before its seal; 0 stands for a slot that is being written. */
static uint32_t fgrad_sealed(const volatile fgrad_slot *slot) {
  const volatile uint8_t *bytes = (const volatile uint8_t *)slot;
  const uint32_t size = (uint32_t)((const volatile uint8_t *)&slot->seal - bytes);
  uint32_t hash = 2166136261u, i;
  for (i = 0; i < size; ++i) {
    hash = (hash ^ bytes[i]) * 16777619u;
  }
  return hash == 0 ? 1u : hash;
}

static int32_t fgrad_is_valid(const volatile fgrad_slot *slot) {
  return slot->seal != 0 && slot->seal == fgrad_sealed(slot);
}

/* The slot of the latest commit, or -1. */
static int32_t fgrad_latest(const volatile fgrad_slot slots[2]) {
  const int32_t first = fgrad_is_valid(&slots[0]), second = fgrad_is_valid(&slots[1]);
  if (first && second) {
    return (int32_t)(slots[1].number - slots[0].number) > 0;
  }
  return first ? 0 : second ? 1 : -1;
}

static void fgrad_copy_to(volatile uint8_t *to, const uint8_t *from, uint32_t size) {
  uint32_t i;
  for (i = 0; i < size; ++i) to[i] = from[i];
}

static void fgrad_copy_from(uint8_t *to, const volatile uint8_t *from, uint32_t size) {
  uint32_t i;
  for (i = 0; i < size; ++i) to[i] = from[i];
}

void fgrad_commit(volatile fgrad_slot slots[2], const fgrad_weights *weights,
                  const fgrad_state *state) {
  const int32_t latest = fgrad_latest(slots);
  volatile fgrad_slot *slot = &slots[latest == 0 ? 1 : 0];
  const uint32_t number = latest < 0 ? 0u : slots[latest].number + 1u;
  slot->seal = 0;
  fgrad_copy_to((volatile uint8_t *)&slot->weights, (const uint8_t *)weights,
                sizeof(*weights));
  fgrad_copy_to((volatile uint8_t *)&slot->state, (const uint8_t *)state,
                sizeof(*state));
  slot->number = number;
  slot->seal = fgrad_sealed(slot);
}

int32_t fgrad_load(const volatile fgrad_slot slots[2], fgrad_weights *weights,
                   fgrad_state *state) {
  const int32_t latest = fgrad_latest(slots);
  if (latest < 0) return 0;
  fgrad_copy_from((uint8_t *)weights, (const volatile uint8_t *)&slots[latest].weights,
                  sizeof(*weights));
  fgrad_copy_from((uint8_t *)state, (const volatile uint8_t *)&slots[latest].state,
                  sizeof(*state));
  return 1;
}
