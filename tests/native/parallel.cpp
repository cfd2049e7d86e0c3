// Prints "ok" when parallel_for covers every range exactly once: alone, nested, from several
// threads at once, and in a forked child.
#include "common/parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using hunyuan_fast::parallel_for;

#define REQUIRE(condition)                                 \
    do {                                                   \
        if (!(condition)) {                                \
            std::printf("%d: %s\n", __LINE__, #condition); \
            std::fflush(stdout);                           \
            std::_Exit(1);                                 \
        }                                                  \
    } while (false)

static void covers(int64_t count, int64_t grain, int num_threads) {
    int64_t const piece = std::max<int64_t>(grain, 1);
    std::vector<std::atomic<int>> hits(std::max<int64_t>(count, 0));
    parallel_for(count, grain, num_threads, [&](int64_t first, int64_t last) {
        REQUIRE(first % piece == 0);
        REQUIRE(last == std::min(first + piece, count));
        for (int64_t i = first; i < last; ++i) hits[i]++;
    });
    for (auto& hit : hits) REQUIRE(hit == 1);
}

int main() {
    for (int num_threads : {0, 1, 2, 3, 8}) {
        for (int64_t count : {-1, 0, 1, 7, 100, 1000}) {
            for (int64_t grain : {0, 1, 3, 64, 5000}) covers(count, grain, num_threads);
        }
    }

    std::vector<std::thread> callers;
    for (int k = 0; k < 4; ++k) {
        callers.emplace_back([] {
            for (int i = 0; i < 200; ++i) covers(333, 7, 3);
        });
    }
    for (auto& caller : callers) caller.join();

    std::atomic<int64_t> total{0};
    parallel_for(10, 1, 4, [&](int64_t, int64_t) {
        parallel_for(100, 9, 4, [&](int64_t first, int64_t last) { total += last - first; });
    });
    REQUIRE(total == 1000);

    pid_t const child = fork();
    if (child == 0) {
        covers(1000, 3, 4);
        std::_Exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    std::puts("ok");
}
