// A persistent team of threads that runs one job at a time; the caller is thread 0.
#pragma once

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace millis {

struct Range {
  int first, last;
};

// The part of [0, count) that is a thread's.
inline Range share(int count, int thread, int threads) {
  const auto at = [&](int t) { return static_cast<int>(static_cast<int64_t>(count) * t / threads); };
  return {at(thread), at(thread + 1)};
}

class Pool {
 public:
  // Throws std::invalid_argument unless threads lie in [1, 1024], or if the system does not start that many.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(arrived_.size()); }

  // Runs job(t) on every thread t and returns when all are done. One caller at a time. The job must not throw: the
  // others would wait at a barrier for ever.
  template <class Job>
  void run(const Job& job) {
    start([](const void* context, int thread) noexcept { (*static_cast<const Job*>(context))(thread); }, &job);
  }

  // Inside a job: returns once every thread has called it; writes before it are seen after it.
  void barrier(int thread) { meet(thread, false); }

  // Inside a job: visits each of [0, count) on one thread. Every thread begins with its part of them, those that lie together, and
  // then helps some others with theirs, for no two threads are equally fast at all times. Every thread calls it, and a barrier lies
  // between two calls.
  template <class Visit>
  void deal(int thread, int count, const Visit& visit) {
    const unsigned now = dealt_[static_cast<size_t>(thread)].deals++ % 2;
    dealt_[static_cast<size_t>(thread)].taken[1 - now].store(0, std::memory_order_relaxed);  // for the next call
    for (int i = 0; i < std::min(threads(), kHelped); ++i) {
      const int whose = (thread + i) % threads();
      const Range part = share(count, whose, threads());
      std::atomic<int>& taken = dealt_[static_cast<size_t>(whose)].taken[now];
      while (part.first + taken.load(std::memory_order_relaxed) < part.last) {
        const int at = part.first + taken.fetch_add(1, std::memory_order_relaxed);
        if (at < part.last) visit(at);
      }
    }
  }

  // Whether this is a forked child, which has the pool's memory but neither its threads nor, for certain, the locks of those
  // that used it. It must not call run().
  bool lost_in_fork() const;

 private:
  using Start = void (*)(const void* context, int thread) noexcept;
  struct alignas(64) Epoch {
    std::atomic<uint32_t> value{0};
    std::atomic<int> cpu{-1};  // where the thread was seen last
    // The rest is touched by its thread only.
    uint32_t mine = 0;
    bool confined = false;  // for the rest of the job, to CPUs that the others do not use
#ifdef __linux__
    cpu_set_t allowed;  // meanwhile
#endif
  };
  struct alignas(64) Dealt {
    std::atomic<int> taken[2]{};  // of the thread's part, in this call of deal() and in the next
    unsigned deals = 0;           // calls, touched by its thread only
  };
  static constexpr int kHelped = 4;  // threads whose parts one looks at, its own among them

  void start(Start job, const void* context);
  void work(int thread);
  void meet(int thread, bool last);  // the last meeting of a job confines no thread
  void leave_shared_cpu(int thread);
  void finish(int thread);
  void stop();

  std::vector<Epoch> arrived_;
  std::vector<Dealt> dealt_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<int> sleepers_{0};  // threads that gave up spinning at a barrier
  bool stop_ = false;
  Start job_ = nullptr;
  const void* context_ = nullptr;
  unsigned forks_;  // of this process and its ancestors, when it began
};

}  // namespace millis
