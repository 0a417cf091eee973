// SPDX-License-Identifier: Apache-2.0
// Objects for one call at a time, reused: a caller takes a free one or makes one. Safe from many threads.
// Take and give back with the GIL held: a fork of the process has it, so it finds the lock free.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace vimcore::python {

template <class T>
class Reusable {
public:
    class Lease {
    public:
        Lease(Reusable& all, std::unique_ptr<T> item) : all_(all), item_(std::move(item)) {}
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;
        ~Lease() { all_.give(std::move(item_)); }
        T& operator*() { return *item_; }
        T* operator->() { return item_.get(); }

    private:
        Reusable& all_;
        std::unique_ptr<T> item_;
    };

    template <class Make>
    std::unique_ptr<T> take(Make&& make)
    {
        {
            std::lock_guard lock(mutex_);
            if (!free_.empty()) {
                std::unique_ptr<T> item = std::move(free_.back());
                free_.pop_back();
                return item;
            }
        }
        return make();
    }

    void give(std::unique_ptr<T> item)
    {
        std::lock_guard lock(mutex_);
        free_.push_back(std::move(item));
    }

    void clear()
    {
        std::vector<std::unique_ptr<T>> old;
        std::lock_guard lock(mutex_);
        old.swap(free_);
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<T>> free_;
};

}  // namespace vimcore::python
