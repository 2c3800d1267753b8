// The pool's threads: they spin briefly for the next job, then park; at barriers they spin, then sleep.
#include "pool.h"

#include <pthread.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#endif

#include <chrono>
#include <climits>
#include <stdexcept>
#include <string>

namespace millis {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // about as long as x86's pause; "yield" takes no time on most processors
#endif
}

constexpr int kBarrierSpins = 1000;  // 15 to 50 us; a longer wait can afford a sleep

// Linux's futex; elsewhere a thread that waits gives its core away.
void sleep_while(const std::atomic<uint32_t>& value, uint32_t seen) {
#ifdef __linux__
  ::syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
  if (value.load() == seen) std::this_thread::yield();
#endif
}

void wake_all([[maybe_unused]] const std::atomic<uint32_t>& value) {
#ifdef __linux__
  ::syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

int current_cpu() {
#ifdef __linux__
  return ::sched_getcpu();
#else
  return -1;
#endif
}

// Counted in the child, where the pool's threads and whoever held its user's locks are gone.
std::atomic<unsigned> forks{0};
[[maybe_unused]] const int counted = ::pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

size_t checked(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must lie in [1, 1024], not " + std::to_string(threads));
  return static_cast<size_t>(threads);
}

constexpr auto kSpin = std::chrono::microseconds(100);  // between two steps of a decode, Python takes less

}  // namespace

Pool::Pool(int threads) : arrived_(checked(threads)), dealt_(arrived_.size()), forks_(forks.load()) {
  workers_.reserve(static_cast<size_t>(threads));
  try {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
  } catch (const std::exception&) {
    const size_t started = workers_.size() + 1;
    stop();
    throw std::invalid_argument("this system starts only " + std::to_string(started) + " of " + std::to_string(threads) + " threads; ask for fewer");
  }
}

Pool::~Pool() {
  // A forked child can neither join nor detach threads it does not have; its copy of their handles is left alone.
  if (lost_in_fork()) new std::vector<std::thread>(std::move(workers_));
  else stop();
}

void Pool::stop() {
  stop_ = true;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (auto& worker : workers_) worker.join();
}

bool Pool::lost_in_fork() const { return forks.load(std::memory_order_relaxed) != forks_; }

void Pool::start(Start job, const void* context) {
  job_ = job, context_ = context;
  arrived_[0].cpu.store(current_cpu(), std::memory_order_relaxed);
  if (!workers_.empty()) {
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
  }
  job(context, 0);
  finish(0);
}

// Threads that each have a core mostly meet within the spins. Where other programs want the cores too, the last thread may not
// even run: the others then sleep, for a yield would give their cores away for a whole time slice each.
void Pool::meet(int thread, bool last) {
  auto& own = arrived_[static_cast<size_t>(thread)];
  const uint32_t epoch = ++own.mine;
  own.value.store(epoch);  // before the look at sleepers_, as a sleeper counts itself before its last look at the value
  if (sleepers_.load() != 0) wake_all(own.value);
  for (auto& other : arrived_) {
    const auto behind = [&](uint32_t value) { return static_cast<int32_t>(value - epoch) < 0; };
    uint32_t seen = other.value.load(std::memory_order_acquire);
    for (int i = 0; behind(seen) && i < kBarrierSpins; ++i) pause(), seen = other.value.load(std::memory_order_acquire);
    if (!behind(seen)) continue;
    sleepers_.fetch_add(1);
    while (behind(seen = other.value.load())) sleep_while(other.value, seen);
    sleepers_.fetch_sub(1);
    if (!last) leave_shared_cpu(thread);
  }
}

// Linux wakes a thread on the core of the one that woke it where it knows of no cache that an idle core shares, as in many virtual
// machines. Both then stay there for tens of milliseconds, each at half speed. So a thread that slept looks where it is, and leaves;
// until the job ends it may not come back, for the next wake would bring it.
void Pool::leave_shared_cpu(int thread) {
  Epoch& own = arrived_[static_cast<size_t>(thread)];
  const int mine = current_cpu();
  own.cpu.store(mine, std::memory_order_relaxed);
#ifdef __linux__
  cpu_set_t rest;
  if (mine < 0 || own.confined || ::sched_getaffinity(0, sizeof own.allowed, &own.allowed) != 0) return;
  rest = own.allowed;
  bool shared = false;
  for (const Epoch& other : arrived_) {
    const int cpu = other.cpu.load(std::memory_order_relaxed);
    if (&other == &own || cpu < 0) continue;
    shared = shared || cpu == mine;
    CPU_CLR(static_cast<size_t>(cpu), &rest);
  }
  own.confined = shared && CPU_COUNT(&rest) > 0 && ::sched_setaffinity(0, sizeof rest, &rest) == 0;
  if (own.confined) own.cpu.store(current_cpu(), std::memory_order_relaxed);
#endif
}

// Nobody finds a thread confined once the job has returned: what a thread may use is given back before the last barrier.
void Pool::finish(int thread) {
#ifdef __linux__
  Epoch& own = arrived_[static_cast<size_t>(thread)];
  if (own.confined) ::sched_setaffinity(0, sizeof own.allowed, &own.allowed);
  own.confined = false;
#endif
  meet(thread, true);
}

void Pool::work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (started_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) pause();
    const bool parks = started_.load(std::memory_order_acquire) == seen;
    if (parks) started_.wait(seen, std::memory_order_acquire);
    if (stop_) return;
    if (parks) leave_shared_cpu(thread);
    else arrived_[static_cast<size_t>(thread)].cpu.store(current_cpu(), std::memory_order_relaxed);
    job_(context_, thread);
    finish(thread);
  }
}

}  // namespace millis
