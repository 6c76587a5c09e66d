extern const fgrad_state fgrad_initial_state;

/* One step of training; weights and state change in place. */
void fgrad_step(fgrad_weights *weights, fgrad_state *state, const fgrad_batch *batch);

/* Weights and state in memory that outlives a power cut. There are two slots: a commit
   writes the one that does not hold the latest state, and its seal last. */
typedef struct {
  fgrad_weights weights;
  fgrad_state state;
  uint32_t number;
  uint32_t seal;
} fgrad_slot;

void fgrad_commit(volatile fgrad_slot slots[2], const fgrad_weights *weights,
                  const fgrad_state *state);

/* Reads what was committed last and returns 1, or returns 0 if nothing ever was. */
int32_t fgrad_load(const volatile fgrad_slot slots[2], fgrad_weights *weights,
                   fgrad_state *state);
