// The pool's threads: they spin briefly for the next job, then park; barriers spin, then yield.
#include "pool.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <string>

namespace millis {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // waits some ten nanoseconds, as x86's pause does; yield is no wait at all on most cores
#endif
}

// Spins for as long as a barrier usually takes, then gives the core away: it may be the one the others need.
template <class Done>
void spin_until(const Done& done) {
  for (int i = 0; !done(); ++i) i < 1000 ? pause() : std::this_thread::yield();
}

constexpr auto kSpin = std::chrono::microseconds(100);  // between two steps of a decode, Python takes less

}  // namespace

Pool::Pool(int threads) : arrived_(static_cast<size_t>(threads)), process_(::getpid()) {
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

bool Pool::lost_in_fork() const { return !workers_.empty() && ::getpid() != process_; }

void Pool::start(Start job, const void* context) {
  job_ = job, context_ = context;
  if (!workers_.empty()) {
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
  }
  job(context, 0);
  barrier(0);
}

void Pool::barrier(int thread) {
  auto& own = arrived_[static_cast<size_t>(thread)];
  const uint32_t epoch = ++own.mine;
  own.value.store(epoch, std::memory_order_release);
  for (auto& other : arrived_) spin_until([&] { return static_cast<int32_t>(other.value.load(std::memory_order_acquire) - epoch) >= 0; });
}

void Pool::work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (started_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) pause();
    started_.wait(seen, std::memory_order_acquire);
    if (stop_) return;
    job_(context_, thread);
    barrier(thread);
  }
}

}  // namespace millis
