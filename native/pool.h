// A persistent team of threads that runs one job at a time; the caller is thread 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace millis {

class Pool {
 public:
  using Job = void (*)(void* context, int thread);

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(arrived_.size()); }

  // Runs job(context, t) on every thread t and returns when all are done. The job must not throw.
  void run(Job job, void* context);

  // Inside a job: returns once every thread has called it; writes before it are seen after it.
  void barrier(int thread);

 private:
  struct alignas(64) Epoch {
    std::atomic<uint32_t> value{0};
    uint32_t mine = 0;  // touched by its thread only
  };
  void work(int thread);

  std::vector<Epoch> arrived_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> started_{0};
  bool stop_ = false;
  Job job_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace millis
