// How the blocks of a team exchange partial sums and coefficients through global memory (csrc/cuda/exchange.cuh), as a
// model for Spin, which tries every interleaving of the blocks' steps. ONE_BARRIER models slices of which every block
// merges all sums; without it each block merges its share of the channels and publishes their coefficients. Each of the
// FAULT_ switches breaks the protocol in one place.
//
// A block's threads are one process, because __syncthreads() joins them at each end of a wait. Each access to global
// memory is a step of its own; an atomic operation is one step, as in hardware. A block's sums of all channels are one
// value, and so are the coefficients of its share, because the protocol treats them alike. A block reads its peers'
// values in one order only: a read changes nothing, so whether it finds the right value depends on when it happens and
// not on other reads. Spin assumes sequential consistency; docs/exchange.md argues that the kernels' orders suffice.
#ifndef BLOCKS
#define BLOCKS 3  // of the team
#endif
#define SLICES 3  // of the team, in each launch
#define LAUNCHES 2

#ifdef FAULT_SINGLE_BUFFER
#define BUFFERS 1
#else
#define BUFFERS 2
#endif

// In global memory: TeamCounters and TeamWorkspace. Sums and coefficients are the number of their slice, which counts
// on from launch to launch.
byte arrivals, leavers;
byte sums[BUFFERS * BLOCKS];
byte coefficients[BLOCKS];

#define SUMS(block) sums[(slice % BUFFERS) * BLOCKS + block]
#define NUMBER (launch * SLICES + slice + 1)

// The first half of Exchange::wait().
inline arrive() {
  atomic {
    arrivals_ = arrivals_ + BLOCKS;  // no other block sees this
    arrivals++  // add_one_and_release
  }
}

// The second half: load_and_acquire until there are enough. A wait that nobody ends is an invalid end state.
inline await_peers() {
  arrivals >= arrivals_
}

// get() of Exchange::for_assigned_channels.
inline read_sums() {
  for (peer : 0 .. BLOCKS - 1) {
    assert(SUMS(peer) == NUMBER)
  }
}

// Exchange::copy_coefficients, behind its wait.
inline read_coefficients() {
  for (peer : 0 .. BLOCKS - 1) {
    assert(coefficients[peer] == NUMBER)
  }
}

// Exchange::finish(): the last block to leave clears the counters.
inline finish() {
#if defined(FAULT_NO_RESET)
  skip
#elif defined(FAULT_EARLY_RESET)
  arrivals = 0
#else
  atomic {
    is_last = (leavers == BLOCKS - 1);
    leavers++  // add_one_and_see
  }
  if
  :: is_last ->
    arrivals = 0;
    leavers = 0
  :: else
  fi
#endif
}

// The loop over slices of a single-pass kernel.
proctype block(byte segment; byte launch) {
  byte slice, peer, arrivals_;
  bool is_last;
  for (slice : 0 .. SLICES - 1) {
#ifdef FAULT_EARLY_ARRIVAL
    arrive();
    SUMS(segment) = NUMBER;
#else
    SUMS(segment) = NUMBER;  // publish_sums
    arrive();
#endif
    await_peers();
    read_sums();
#ifndef ONE_BARRIER
    coefficients[segment] = NUMBER;  // publish_coefficients
#ifndef FAULT_UNAWAITED_COEFFICIENTS
    arrive();
    await_peers();
#endif
    read_coefficients()
#endif
  }
  finish()
}

// A stream: a launch begins when all blocks of the one before it have ended, and finds the counters at zero.
init {
  byte launch, segment;
  for (launch : 0 .. LAUNCHES - 1) {
    atomic {
      for (segment : 0 .. BLOCKS - 1) {
        run block(segment, launch)
      }
    }
    _nr_pr == 1;
    assert(arrivals == 0 && leavers == 0)
  }
}
