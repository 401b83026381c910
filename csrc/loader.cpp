// bertfast._C: the inner loops of the data loader. What they compute is written down, and computed bit for bit the
// same, in bertfast/data/plan.py; here it is fast. numpy arrays in and out, the GIL released while they are worked on.
//
//   plan     which sentences make which sample         (Google's BERT, create_pretraining_data)
//   shuffle  the order of an epoch's samples            (Fisher-Yates)
//   pack     which samples make which batch             (first in, first out, then best fit)
//   fill     one batch: ids, masks, row indices         (Devlin et al. 2018, section 3.1)

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

// ---------------------------------------------------------------------------------------------------------------
// Random numbers: Philox-4x32 with 7 rounds (Salmon et al. 2011), a pure function of seed and counters.

enum Purpose : uint32_t { PLAN, TRUNCATE, SHUFFLE, PICK, REPLACE };

using Words = std::array<uint32_t, 4>;

struct Random {
  uint64_t seed;
  uint32_t epoch;

  Words operator()(Purpose purpose, uint64_t index, uint32_t draw) const {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    Words c = {draw, uint32_t(index), uint32_t(index >> 32), epoch << 8 | purpose};
    for (int round = 0; round < 7; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
      c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }
};

// A random word as an integer in [0, n): multiply and shift, biased by n / 2^32 at most.
uint32_t below(uint32_t word, uint64_t n) { return uint32_t(word * n >> 32); }

struct Sample {  // plan.SAMPLE in Python
  int64_t a, b;  // where the segments begin in the tokens
  uint16_t a_len, b_len;
  int32_t label;  // 0: B continues A; 1: B is random; -100: there is no B
  int32_t length() const { return a_len + b_len + (b_len ? 3 : 2); }
};
static_assert(sizeof(Sample) == 24);

using Int64s = py::array_t<int64_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

// A vector's memory as a numpy array, without a copy.
template <typename T, typename Out>
py::array_t<Out> to_numpy(std::vector<T>&& values) {
  auto* kept = new std::vector<T>(std::move(values));
  py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<Out>(py::ssize_t(kept->size() * sizeof(T) / sizeof(Out)), reinterpret_cast<Out*>(kept->data()), owner);
}

// ---------------------------------------------------------------------------------------------------------------
// plan

struct Planner {
  const int64_t *sentences, *documents, *chosen;
  int64_t n_chosen;
  Random random;
  int64_t max_seqlen;
  bool nsp;
  uint64_t short_threshold;
  std::vector<Sample> samples;

  // Segments longer than `room` together lose tokens one at a time: the longer one, at a random end.
  void emit(int64_t a, int64_t a_len, int64_t b, int64_t b_len, int label, int64_t room, int64_t document, uint32_t k) {
    Words bits{};
    for (uint32_t cut = 0; a_len + b_len > room; ++cut) {
      if (cut % 128 == 0) bits = random(TRUNCATE, document, k * 16 + cut / 128);
      const bool front = bits[cut % 128 / 32] >> (cut % 32) & 1;
      if (a_len > b_len) {
        --a_len;
        a += front;
      } else {
        --b_len;
        b += front;
      }
    }
    samples.push_back({a, b, uint16_t(a_len), uint16_t(b_len), label});
  }

  void walk(int64_t rank) {
    const int64_t document = chosen[rank], end = documents[document + 1], room = max_seqlen - (nsp ? 3 : 2);
    int64_t i = documents[document];
    for (uint32_t k = 0; i < end; ++k) {
      const Words w = random(PLAN, document, 2 * k);
      const int64_t target = w[0] < short_threshold ? 2 + below(w[1], room - 1) : room;
      int64_t j = i + 1;
      while (j < end && sentences[j] - sentences[i] < target) ++j;
      if (!nsp) {
        emit(sentences[i], sentences[j] - sentences[i], 0, 0, -100, room, document, k);
        i = j;
        continue;
      }
      bool next = w[3] < 0x80000000u;
      if (next && j == i + 1 && j < end) ++j;  // a true continuation needs a second sentence
      const int64_t a_end = j == i + 1 ? j : i + 1 + below(w[2], j - i - 1);
      const int64_t a = sentences[i], a_len = sentences[a_end] - a;
      next = next && sentences[j] - a > 1;  // a single token cannot continue itself
      const Words v = random(PLAN, document, 2 * k + 1);

      int64_t b_begin = -1, b_stop = 0;  // sentences of a random B
      if (!next) {
        if (n_chosen > 1) {
          const int64_t other = below(v[0], n_chosen - 1);
          const int64_t from = chosen[other + (other >= rank)];
          b_begin = documents[from] + below(v[1], documents[from + 1] - documents[from]);
          b_stop = documents[from + 1];
        } else {  // the only document: a sentence of it that is not in this chunk
          const int64_t begin = documents[document], others = end - begin - (j - i);
          if (others > 0) {
            b_begin = begin + below(v[1], others);
            if (b_begin >= i) b_begin += j - i;
            b_stop = b_begin < i ? i : end;
          }
        }
      }
      if (b_begin >= 0) {
        int64_t b_end = b_begin + 1;
        while (b_end < b_stop && sentences[b_end] - sentences[b_begin] < target - a_len) ++b_end;
        emit(a, a_len, sentences[b_begin], sentences[b_end] - sentences[b_begin], 1, room, document, k);
        i = a_end;  // what A left of the chunk is put back
      } else if (a_end < j) {
        emit(a, a_len, a + a_len, sentences[j] - sentences[a_end], 0, room, document, k);
        i = j;
      } else {  // a lone sentence continues itself
        if (a_len > 1) {
          const int64_t half = 1 + below(v[2], a_len - 1);
          emit(a, half, a + half, a_len - half, 0, room, document, k);
        }
        i = j;
      }
    }
  }
};

Bytes plan(Int64s sentences, Int64s documents, Int64s chosen, uint64_t seed, uint32_t epoch, int64_t max_seqlen, bool nsp,
           uint64_t short_threshold) {
  const int64_t n = chosen.size();
  const Planner planner{sentences.data(), documents.data(), chosen.data(), n, {seed, epoch}, max_seqlen, nsp,
                        short_threshold, {}};
  // Documents depend on nothing but their index, so threads take equal ranges of them; few documents take no threads.
  const int64_t n_threads = std::clamp<int64_t>(std::min<int64_t>(n / 4096, std::thread::hardware_concurrency()), 1, 16);
  std::vector<Planner> parts(n_threads, planner);
  {
    py::gil_scoped_release release;
    const auto work = [&](int64_t t) {
      const int64_t begin = n * t / n_threads, end = n * (t + 1) / n_threads;
      for (int64_t rank = begin; rank < end; ++rank) parts[t].walk(rank);
    };
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < n_threads; ++t) threads.emplace_back(work, t);
    work(0);
    for (auto& thread : threads) thread.join();
    for (int64_t t = 1; t < n_threads; ++t) {
      parts[0].samples.insert(parts[0].samples.end(), parts[t].samples.begin(), parts[t].samples.end());
      std::vector<Sample>().swap(parts[t].samples);
    }
  }
  return to_numpy<Sample, uint8_t>(std::move(parts[0].samples));
}

// ---------------------------------------------------------------------------------------------------------------
// shuffle

Int64s shuffle(int64_t n, uint64_t seed, uint32_t epoch) {
  std::vector<int64_t> order(n);
  {
    py::gil_scoped_release release;
    const Random random{seed, epoch};
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    for (int64_t i = n - 1; i > 0; --i) {
      const Words w = random(SHUFFLE, i, 0);
      const uint64_t word = uint64_t(w[1]) << 32 | w[0];
      std::swap(order[i], order[uint64_t((unsigned __int128)word * uint64_t(i + 1) >> 64)]);
    }
  }
  return to_numpy<int64_t, int64_t>(std::move(order));
}

// ---------------------------------------------------------------------------------------------------------------
// pack

py::tuple pack(Bytes sample_bytes, Int64s shuffled, int64_t token_budget, int64_t max_sequences, int64_t look_ahead) {
  const auto* samples = reinterpret_cast<const Sample*>(sample_bytes.data());
  const int64_t *upcoming = shuffled.data(), n = shuffled.size();
  std::vector<int64_t> order, offsets{0};
  {
    py::gil_scoped_release release;
    struct Item {
      int64_t sample;
      int32_t length;
    };
    std::vector<Item> window;  // the next look_ahead samples; those before `head` are gone
    size_t head = 0;
    int64_t fed = 0;
    order.reserve(n);
    const auto take = [&](size_t at) {
      order.push_back(window[at].sample);
      if (at == head) ++head;
      else window.erase(window.begin() + at);
    };
    while (int64_t(order.size()) < n) {
      window.erase(window.begin(), window.begin() + head);
      head = 0;
      for (; fed < n && int64_t(window.size()) < look_ahead; ++fed)
        window.push_back({upcoming[fed], samples[upcoming[fed]].length()});
      int64_t room = token_budget, free = max_sequences;
      for (; free && head < window.size() && window[head].length <= room; --free) {
        room -= window[head].length;
        take(head);
      }
      for (; free; --free) {
        size_t best = window.size();
        for (size_t i = head; i < window.size(); ++i)
          if (window[i].length <= room && (best == window.size() || window[i].length > window[best].length)) best = i;
        if (best == window.size()) break;
        room -= window[best].length;
        take(best);
      }
      offsets.push_back(order.size());
    }
  }
  return py::make_tuple(to_numpy<int64_t, int64_t>(std::move(order)), to_numpy<int64_t, int64_t>(std::move(offsets)));
}

// ---------------------------------------------------------------------------------------------------------------
// fill

struct Vocabulary {
  int64_t size, cls, sep, mask;
  const uint8_t* is_continuation;
};

struct Outputs {  // zeroed, labels -100
  int64_t *input_ids, *token_type_ids, *position_ids, *row_key, *read_rows, *cls_index, *mask_index, *labels, *next_label;
  int32_t *cu_seqlens, *cu_seqlens_read;
};

// Mark which of a sample's tokens to mask, specials not counted: exactly n of m, all subsets equally likely.
void pick_tokens(const Random& random, int64_t index, int64_t m, int64_t n, std::vector<int32_t>& ring, uint8_t* picked) {
  ring.resize(m);
  for (int64_t j = 0; j < m; ++j) ring[j] = int32_t(j);
  Words w{};
  for (int64_t i = 0; i < n; ++i) {  // the first n steps of Fisher-Yates
    if (i % 4 == 0) w = random(PICK, index, uint32_t(i / 4));
    std::swap(ring[i], ring[i + below(w[i % 4], m - i)]);
    picked[ring[i]] = 1;
  }
}

// The same by whole words, in random order, as many as fit into n; a word too long for what is left is passed over.
void pick_words(const Random& random, int64_t index, int64_t m, int64_t n, const std::vector<uint8_t>& starts,
                std::vector<int32_t>& ring, uint8_t* picked) {
  ring.clear();
  for (int64_t j = 0; j < m; ++j)
    if (starts[j]) ring.push_back(int32_t(j));
  const int64_t words = ring.size();
  int64_t left = n;
  Words w{};
  for (int64_t i = 0; i < words && left; ++i) {
    if (i % 4 == 0) w = random(PICK, index, uint32_t(i / 4));
    std::swap(ring[i], ring[i + below(w[i % 4], words - i)]);
    int64_t end = ring[i] + 1;
    while (end < m && !starts[end]) ++end;
    if (end - ring[i] > left) continue;
    left -= end - ring[i];
    for (int64_t j = ring[i]; j < end; ++j) picked[j] = 1;
  }
  if (left == n)  // every word is longer than n: part of one, rather than a sample that teaches nothing
    for (int64_t j = ring[0]; j < ring[0] + n; ++j) picked[j] = 1;
}

template <typename Token>
std::array<int64_t, 2> fill_rows(const Token* tokens, const Sample* samples, const int64_t* chosen, int64_t n_chosen,
                                 const Random& random, const Vocabulary& vocabulary, double mlm_probability,
                                 bool whole_word, int64_t first_sequence, int64_t max_sequences, Outputs out) {
  std::vector<int32_t> ring;
  std::vector<uint8_t> picked, starts;
  int64_t row = 0, read = 0, n_masked = 0;
  for (int64_t s = 0; s < n_chosen; ++s) {
    const int64_t index = chosen[s], begin = row, m = samples[index].a_len + samples[index].b_len;
    const Sample& sample = samples[index];
    const auto put = [&](int64_t id, int64_t type) {
      out.input_ids[row] = id;
      out.token_type_ids[row] = type;
      out.position_ids[row] = row - begin;
      out.row_key[row] = (first_sequence + s) << 32 | (row - begin);
      ++row;
    };
    put(vocabulary.cls, 0);
    for (int64_t j = 0; j < sample.a_len; ++j) put(tokens[sample.a + j], 0);
    put(vocabulary.sep, 0);
    for (int64_t j = 0; j < sample.b_len; ++j) put(tokens[sample.b + j], 1);
    if (sample.b_len) put(vocabulary.sep, 1);

    out.cls_index[s] = read;
    const auto predict = [&](int64_t from, int64_t id) {
      out.labels[n_masked] = id;
      out.mask_index[n_masked++] = read;
      out.read_rows[read++] = from;
    };
    if (mlm_probability == 0) {
      for (int64_t i = begin; i + 1 < row; ++i) predict(i, out.input_ids[i + 1]);
    } else {
      const auto row_of = [&](int64_t j) { return begin + 1 + j + (j >= sample.a_len); };
      const int64_t n = std::max<int64_t>(1, std::nearbyint(mlm_probability * double(m)));
      picked.assign(m, 0);
      if (whole_word) {
        starts.resize(m);
        for (int64_t j = 0; j < m; ++j)
          starts[j] = j == 0 || j == sample.a_len || !vocabulary.is_continuation[out.input_ids[row_of(j)]];
        pick_words(random, index, m, n, starts, ring, picked.data());
      } else {
        pick_tokens(random, index, m, n, ring, picked.data());
      }
      out.read_rows[read++] = begin;
      for (int64_t j = 0; j < m; ++j) {
        if (!picked[j]) continue;
        int64_t& id = out.input_ids[row_of(j)];
        predict(row_of(j), id);
        const Words w = random(REPLACE, index, uint32_t(j));
        if (w[0] < 3435973837u) id = vocabulary.mask;                    // 80 %
        else if (w[0] < 3865470566u) id = below(w[1], vocabulary.size);  // 10 %: any id at all, as the original
      }
    }
    out.next_label[s] = sample.label;
    out.cu_seqlens[s + 1] = int32_t(row);
    out.cu_seqlens_read[s + 1] = int32_t(read);
  }
  for (int64_t s = n_chosen; s < max_sequences; ++s) {
    out.next_label[s] = -100;
    out.cu_seqlens[s + 1] = int32_t(row);
    out.cu_seqlens_read[s + 1] = int32_t(read);
  }
  return {row, n_masked};
}

py::tuple fill(py::array tokens, Bytes sample_bytes, Int64s chosen, uint64_t seed, uint32_t epoch, py::tuple vocabulary,
               Bytes is_continuation, double mlm_probability, bool whole_word, int64_t first_sequence, py::dict outputs) {
  const auto array = [&](const char* name) { return outputs[name].cast<py::array>(); };
  const auto long_data = [&](const char* name) { return static_cast<int64_t*>(array(name).mutable_data()); };
  const auto int_data = [&](const char* name) { return static_cast<int32_t*>(array(name).mutable_data()); };
  const Outputs out{long_data("input_ids"), long_data("token_type_ids"), long_data("position_ids"),
                    long_data("row_key"), long_data("read_rows"), long_data("cls_index"), long_data("mask_index"),
                    long_data("labels"), long_data("next_sentence_label"), int_data("cu_seqlens"),
                    int_data("cu_seqlens_read")};
  const auto* samples = reinterpret_cast<const Sample*>(sample_bytes.data());
  const int64_t max_sequences = array("cls_index").size();
  int64_t total = 0;  // a wrong caller must not write past the arrays
  for (int64_t s = 0; s < chosen.size(); ++s) total += samples[chosen.at(s)].length();
  const int64_t room = std::min(array("input_ids").size(), mlm_probability == 0 ? array("labels").size() : total);
  if (chosen.size() > max_sequences || total > room) throw std::invalid_argument("batch too small");
  const Vocabulary vocab{vocabulary[0].cast<int64_t>(), vocabulary[1].cast<int64_t>(), vocabulary[2].cast<int64_t>(),
                         vocabulary[3].cast<int64_t>(), is_continuation.data()};
  const auto run = [&](const auto* data) {
    py::gil_scoped_release release;
    return fill_rows(data, samples, chosen.data(), chosen.size(), Random{seed, epoch}, vocab, mlm_probability, whole_word,
                     first_sequence, max_sequences, out);
  };
  const auto counts = tokens.itemsize() == 2 ? run(static_cast<const uint16_t*>(tokens.data()))
                                             : run(static_cast<const uint32_t*>(tokens.data()));
  return py::make_tuple(counts[0], counts[1]);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The data loader's inner loops; bertfast/data/plan.py says what they compute.";
  m.def("plan", &plan);
  m.def("shuffle", &shuffle);
  m.def("pack", &pack);
  m.def("fill", &fill);
}
