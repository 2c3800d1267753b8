// Native work that lets other Python threads run meanwhile.
#pragma once

#include <nanobind/nanobind.h>
#include <unistd.h>

namespace millis {

// Gives the GIL up for as long as it lives. When the interpreter ends, taking it back unwinds a daemon thread, which must
// not pass nanobind's noexcept frames (std::terminate): such a thread sleeps until the process is gone.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      while (true) ::pause();
    }
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace millis
