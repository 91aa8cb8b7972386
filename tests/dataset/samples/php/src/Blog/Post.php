<?php

namespace App\Blog;

final class Post
{
    public function __construct(public readonly string $title)
    {
        if ($title === '') {
            throw new \InvalidArgumentException('a post has a title');
        }
    }
}
