#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace hunyuan_fast {
namespace {

struct Job {
    int64_t count, grain;
    Piece piece;
    void const* body;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < count;) {
            piece(body, first, std::min(first + grain, count));
        }
    }
};

thread_local bool inside = false;  // this thread is working on a job

class Pool {
public:
    // False when another job is running: the caller then works alone.
    bool run(Job& job, int helpers) {
        std::unique_lock<std::mutex> whole(one_job_, std::try_to_lock);
        if (!whole) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (threads_ < helpers) {
                std::thread([this, rank = threads_] { serve(rank); }).detach();
                ++threads_;
            }
            job_ = &job;
            wanted_ = helpers;
            busy_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        return true;
    }

private:
    void serve(int rank) {
        inside = true;
        uint64_t seen = 0;
        for (std::unique_lock<std::mutex> lock(mutex_);;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (rank >= wanted_) continue;
            Job* const job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex one_job_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    uint64_t generation_ = 0;
    int threads_ = 0, wanted_ = 0, busy_ = 0;
};

// Never freed: its threads wait on it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        the_pool = new Pool;
        // a forked child has the pool's memory and none of its threads
        pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
    });
    return *the_pool;
}

// The entry of the OpenMP runtime that torch has loaded; null without one, and in a forked child,
// where that runtime would wait for threads which do not exist.
pid_t const loaded_in = getpid();
using Team = void (*)(void (*)(void*), void*, unsigned num_threads, unsigned flags);

Team openmp_team() {
    static Team const team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return getpid() == loaded_in ? team : nullptr;
}

void work_in_team(void* job) {
    inside = true;
    static_cast<Job*>(job)->work();
    inside = false;
}

}  // namespace

void run_pieces(int64_t count, int64_t grain, int num_threads, Piece piece, void const* body) {
    if (count <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    int64_t const pieces = (count + grain - 1) / grain;
    int const helpers = static_cast<int>(std::min<int64_t>(num_threads, pieces)) - 1;
    Job job{count, grain, piece, body};
    if (helpers > 0 && !inside) {
        if (Team const team = openmp_team()) {
            team(work_in_team, &job, static_cast<unsigned>(helpers + 1), 0);
            return;
        }
        inside = true;
        bool const shared = pool().run(job, helpers);
        inside = false;
        if (shared) return;
    }
    job.work();
}

}  // namespace hunyuan_fast
