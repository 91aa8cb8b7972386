<?php

namespace App\Blog;

use App\Blog\Post;

class Store implements \Countable
{
    /** @var Post[] */
    private array $posts = [];

    public function add(Post $post): void
    {
        $this->posts[] = $post;
    }

    public function count(): int
    {
        return count($this->posts);
    }
}
