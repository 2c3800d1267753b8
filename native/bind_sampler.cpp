// Python's view of a request's sampler: made once a request, handed to Runtime.step.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <span>
#include <stdexcept>
#include <tuple>

#include "arrays.h"
#include "cpu.h"
#include "sampler.h"
#include "unlocked.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace millis {

void bind_sampler(nb::module_& m) {
  m.attr("UNUSABLE") = kUnusable;
  m.attr("MASK_LATE") = kMaskLate;
  nb::class_<Sampler>(m, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, int vocab, float temperature, int top_k, float top_p, float min_p, float repetition, float presence, float frequency,
             std::vector<std::pair<int32_t, float>> bias, uint64_t seed, int logprobs) {
            new (self) Sampler(vocab, {temperature, {top_k, top_p, min_p}, repetition, presence, frequency, std::move(bias), seed, logprobs});
          },
          "vocab"_a, nb::kw_only(), "temperature"_a = 0.0f, "top_k"_a = 0, "top_p"_a = 1.0f, "min_p"_a = 0.0f, "repetition"_a = 1.0f,
          "presence"_a = 0.0f, "frequency"_a = 0.0f, "bias"_a = std::vector<std::pair<int32_t, float>>{}, "seed"_a = 0, "logprobs"_a = -1)
      .def_prop_ro("logprobs", &Sampler::logprobs, "-1, or how many alternatives are reported.")
      .def(
          "seen", [](Sampler& self, const Array<int32_t>& tokens) { self.seen(copy_of(tokens)); }, "tokens"_a.noconvert(),
          "Counts prompt tokens for the repetition penalty.")
      .def(
          "set_mask",
          [](Sampler& self, const std::optional<Array<uint32_t>>& mask) {
            if (mask && mask->size() == 0) throw std::invalid_argument("sampler: a mask of another vocabulary");
            self.set_mask(mask ? copy_of(*mask) : std::vector<uint32_t>{});
          },
          "mask"_a.noconvert().none(),
          "[ceil(vocab / 32)] Only tokens whose bit, t % 32 of word t // 32, is set are chosen from now on; None frees all.\n\n"
          "Reported log-probabilities stay the model's own. ValueError: a mask of another size, or one without any token.")
      .def("expect_mask", &Sampler::expect_mask, "A mask is being computed: the next choice waits for set_mask, two seconds at most.")
      .def(
          "commit", [](Sampler& self, const Array<int32_t>& tokens) { self.commit(copy_of(tokens)); }, "tokens"_a.noconvert(),
          "Counts tokens of the output that were not chosen here, and moves the random stream behind them.")
      .def(
          "sample",
          [](Sampler& self, const Array<float>& logits) {
            std::vector<float> copy = copy_of(logits);
            Choice choice;
            {
              const Unlocked unlocked;  // another thread may have to set the mask
              self.choose(copy, {}, select_kernels("auto").log_sum_exp, choice);
            }
            if (choice.token >= 0) self.commit(std::span(&choice.token, 1));
            return std::tuple(choice.token, choice.logprob, std::move(choice.top));
          },
          "logits"_a, "(token, log-probability, best) of one row of logits, as Runtime.step does it.");
}

}  // namespace millis
