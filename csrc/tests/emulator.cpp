#include "emulator.h"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

// Saves the callee-saved registers, switches stacks, and restores the registers from the other stack.
extern "C" void fastcl_emulator_switch(void **from, void *to);
asm(R"(
.text
.local fastcl_emulator_switch
.type fastcl_emulator_switch, @function
fastcl_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastcl_emulator_switch, .-fastcl_emulator_switch
)");

namespace emulator {
namespace {

constexpr int64_t STACK = 64 << 10, EXCHANGED = 128;
enum class State { ready, at_warp, at_part, at_block, at_grid, done };
constexpr int PARTS = 16;

int64_t page() { return sysconf(_SC_PAGESIZE); }

// Memory whose last byte is followed by a protected page.
class Guarded {
public:
  explicit Guarded(int64_t size) : size_(size), mapped_((size + page() - 1) / page() * page() + page()) {
    start_ = (char *)mmap(nullptr, size_t(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start_ == MAP_FAILED) fail("no memory");
    mprotect(start_ + mapped_ - page(), size_t(page()), PROT_NONE);
  }
  ~Guarded() { munmap(start_, size_t(mapped_)); }
  Guarded(const Guarded &) = delete;
  char *data() const { return start_ + mapped_ - page() - size_; }
  char *end() const { return start_ + mapped_ - page(); }

private:
  int64_t size_, mapped_;
  char *start_;
};

struct Warp {
  char given[2][32 * EXCHANGED];
};

struct Block {
  Index index;
  std::unique_ptr<Guarded> shared;
  std::vector<Warp> warps;
};

} // namespace

struct Thread {
  Index index;
  Block *block;
  void *stack_pointer;
  char *stack; // its lowest byte
  State state;
  int64_t exchanges, exchanged; // number of exchanges, and size of the last
  int lane;
  Warp *warp;
  int part, part_size; // name and number of threads of the last part barrier
};

namespace {

struct Run {
  const char *name;
  Index threads, grid;
  const std::function<void()> *kernel;
  void *scheduler;
  std::vector<Thread> all;
};

std::mutex one_at_a_time;
Run *running;
Thread *current;

char *stack(size_t which) { // reused from launch to launch
  static std::vector<char *> stacks;
  while (stacks.size() <= which) {
    char *lowest = (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (lowest == MAP_FAILED) fail("no memory for another thread");
    mprotect(lowest, size_t(page()), PROT_NONE); // an overflow of the stack faults
    stacks.push_back(lowest);
  }
  return stacks[which];
}

void give_way(State state) {
  Thread *self = current;
  self->state = state;
  fastcl_emulator_switch(&self->stack_pointer, running->scheduler);
}

void begin() {
  (*running->kernel)();
  give_way(State::done);
  fail("a thread went on after its end");
}

void prepare(Thread &thread) {
  void **top = (void **)(thread.stack + STACK) - 2; // the layout after a call: a return address below a multiple of 16
  *--top = nullptr;
  *--top = (void *)begin;
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  thread.stack_pointer = top;
  thread.state = State::ready;
}

std::vector<size_t> order_of(size_t count) {
  std::vector<size_t> order(count);
  for (size_t k = 0; k < count; k++) order[k] = k;
  const char *chosen = std::getenv("FASTCL_EMULATOR_ORDER");
  const std::string word = chosen ? chosen : "forward";
  if (word == "backward") std::reverse(order.begin(), order.end());
  else if (word != "forward") std::shuffle(order.begin(), order.end(), std::mt19937(unsigned(std::atoi(word.c_str()))));
  return order;
}

// If all lanes of a warp wait for an exchange, lets them continue. Returns whether it did.
bool release_warp(Thread *lanes) {
  for (int lane = 0; lane < 32; lane++)
    if (lanes[lane].state != State::at_warp) return false;
  for (int lane = 0; lane < 32; lane++) {
    if (lanes[lane].exchanges != lanes[0].exchanges || lanes[lane].exchanged != lanes[0].exchanged) fail("lanes of a warp exchange different things");
    lanes[lane].state = State::ready;
  }
  return true;
}

// Opens barriers that all their threads have reached. Returns whether there was one.
bool release(std::vector<Thread> &threads, size_t of_block) {
  bool any = false;
  size_t done = 0, at_grid = 0;
  for (size_t first = 0; first < threads.size(); first += of_block) {
    size_t at_block = 0, block_done = 0;
    for (size_t t = first; t < first + of_block; t++) {
      at_block += threads[t].state == State::at_block;
      at_grid += threads[t].state == State::at_grid;
      block_done += threads[t].state == State::done;
    }
    for (int name = 0; name < PARTS; name++) {
      size_t waiting = 0, expected = 0;
      for (size_t t = first; t < first + of_block; t++)
        if (threads[t].state == State::at_part && threads[t].part == name) waiting++, expected = size_t(threads[t].part_size);
      if (!waiting || waiting < expected) continue;
      if (waiting > expected) fail("more threads than were expected at a barrier");
      for (size_t t = first; t < first + of_block; t++)
        if (threads[t].state == State::at_part && threads[t].part == name) threads[t].state = State::ready;
      any = true;
    }
    if (at_block == of_block) {
      for (size_t t = first; t < first + of_block; t++) threads[t].state = State::ready;
      any = true;
    }
    done += block_done;
  }
  if (at_grid == threads.size()) {
    for (Thread &thread : threads) thread.state = State::ready;
    any = true;
  }
  if (!any && done != threads.size()) fail("a barrier that not all threads reach");
  return any;
}

// A warp runs until it waits for other warps. If it reads another warp's data without a barrier in between, the order of warps
// decides whether all of the data has been written or none.
void run_threads(std::vector<Thread> &threads, size_t of_block) {
  const std::vector<size_t> warps = order_of(threads.size() / 32), lanes = order_of(32);
  do {
    for (const size_t warp : warps) do
        for (const size_t lane : lanes)
          while (threads[32 * warp + lane].state == State::ready) {
            current = &threads[32 * warp + lane];
            fastcl_emulator_switch(&running->scheduler, current->stack_pointer);
          }
      while (release_warp(&threads[32 * warp]));
  } while (release(threads, of_block));
}

} // namespace

void fail(const char *what) {
  std::fprintf(stderr, "fastcl's emulator: kernel %s: %s\n", running ? running->name : "?", what);
  if (current) std::fprintf(stderr, "  block (%u, %u), thread %u\n", current->block->index.x, current->block->index.y, current->index.x);
  std::abort();
}

const Index &thread_index() { return current->index; }
const Index &block_index() { return current->block->index; }
const Index &block_size() { return running->threads; }
const Index &grid_size() { return running->grid; }
char *shared_memory() { return current->block->shared->data(); }
void block_barrier() { give_way(State::at_block); }
void part_barrier(int name, int threads) {
  if (name < 0 || name >= PARTS || threads % 32) fail("a barrier of part of a block is misnamed");
  current->part = name;
  current->part_size = threads;
  give_way(State::at_part);
}
void grid_barrier() { give_way(State::at_grid); }

const char *exchange(const void *given, int64_t size) {
  if (size > EXCHANGED) fail("an exchange of too many bytes");
  Thread *self = current;
  // Alternates between two buffers: no lane can be two exchanges ahead of another.
  char *place = self->warp->given[self->exchanges++ % 2];
  self->exchanged = size;
  std::memcpy(place + self->lane * size, given, size_t(size));
  give_way(State::at_warp);
  return place;
}

void run(const char *name, int64_t blocks, int64_t blocks_y, int threads, int64_t shared, bool cooperative, const std::function<void()> &kernel) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Run call{name, {unsigned(threads), 1, 1}, {unsigned(blocks), unsigned(blocks_y), 1}, &kernel, nullptr, {}};
  running = &call;
  current = nullptr;
  if (threads % 32 || threads < 32 || threads > 1024) fail("a block's threads are whole warps, 1024 at most");
  if (shared > SHARED) fail("too much shared memory");
  if (cooperative && blocks * blocks_y * shared > PROCESSORS * SHARED) fail("a cooperative launch that does not fit");
  const int64_t together = cooperative ? blocks * blocks_y : 1;
  auto resident = std::vector<Block>(size_t(together));
  call.all.resize(size_t(together * threads));
  for (int64_t start = 0; start < blocks * blocks_y; start += together) {
    for (int64_t b = 0; b < together; b++) {
      Block &block = resident[size_t(b)];
      block.index = {unsigned((start + b) % blocks), unsigned((start + b) / blocks), 0};
      if (!block.shared) block.shared = std::make_unique<Guarded>((shared + 127) / 128 * 128);
      std::memset(block.shared->data(), 0xff, size_t((shared + 127) / 128 * 128)); // NaN, or -1
      block.warps.resize(size_t(threads / 32));
      for (int t = 0; t < threads; t++) {
        Thread &thread = call.all[size_t(b * threads + t)];
        thread = {{unsigned(t), 0, 0},          &block, nullptr, stack(size_t(b * threads + t)), State::ready, 0, 0, t % 32,
                  &block.warps[size_t(t / 32)], 0,      0};
        prepare(thread);
      }
    }
    run_threads(call.all, size_t(threads));
  }
  current = nullptr;
  running = nullptr;
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, digits = bits & 1023;
  const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                     : exponent     ? std::ldexp(float(1024 + digits), exponent - 25)
                                    : std::ldexp(float(digits), -24);
  return bits >> 15 ? -size : size;
}

uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return uint16_t(sign | 0x7fff);
  if (size >= 65520) return uint16_t(sign | 0x7c00);
  const int exponent = std::max(size == 0 ? -14 : std::ilogb(size), -14);
  const int digits = int(std::nearbyint(std::ldexp(size, 10 - exponent))); // 1024 to 2048, less for a subnormal number
  return uint16_t(sign | ((exponent + 14) * 1024 + digits));
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

} // namespace emulator
